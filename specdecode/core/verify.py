"""Verification: the accepted proposals, and the token after them. There is one acceptance rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.core.sampling import Rng, checked_choice
from specdecode.core.transfer import moved
from specdecode.core.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The result of verifying a tree: the tokens that the step may commit.

    Attributes:
        path: the accepted nodes, from a child of the root downwards. The root (node 0) is not listed.
        tokens: the accepted tokens and, last, the target's own token after the path: the bonus if the path ends at a
            leaf, else the correction.
    """

    path: list[int]
    tokens: list[int]


def accept(tree: DraftTree, target: Float[Tensor, "nodes V"] | Int[Tensor, " nodes"], rng: Rng) -> Acceptance:
    """Verify a tree against the target's distributions at its root and at each node.

    Args:
        tree: the N proposals.
        target: row i is the distribution of the token after node i, for N + 1 nodes. If all rows are one-hot, as in
            greedy decoding, give the token of each row instead.
        rng: the randomness of this generation; not used if `target` holds tokens.

    Returns:
        The accepted path and its tokens.

    Raises:
        SpecDecodeError: the target's logits are not finite where it must choose a token.
    """
    if target.ndim == 1:
        if tree.tokens.device.type == "cpu":
            choices = target.tolist()
        else:
            # One transfer brings all values of a greedy step to the host.
            on_host = torch.cat([target, moved(tree.tokens, target.device)]).tolist()
            choices = on_host[: len(target)]
            tree.set_host_tokens(on_host[len(target) :])
        return _walk_greedily(tree.host_tokens, tree.children(), choices)
    # A draft may be on another device than its target.
    probs = None if tree.probs is None else moved(tree.probs, target.device)
    children = tree.children()
    chances = _chances_of_first(tree, children, probs, target)
    return walk(tree.host_tokens, children, probs, target, rng, chances)


def _chances_of_first(
    tree: DraftTree,
    children: Sequence[Sequence[int]],
    probs: Float[Tensor, "N V"] | None,
    target: Float[Tensor, "nodes V"],
) -> dict[int, float]:
    """Return p[x] / q[x] of each node's first child, by the child's number. One transfer brings them and all tokens to
    the host, so that `walk` waits for the device only at a rejection."""
    if not len(tree):
        return {}
    nodes = [node for node, below in enumerate(children) if below]
    first = [children[node][0] for node in nodes]
    tokens = moved(tree.tokens, target.device)
    places = moved(torch.tensor([nodes, first]), target.device)
    drawn = tokens[places[1] - 1]
    chances = target[places[0], drawn]
    if probs is not None:
        chances = chances / probs[places[1] - 1, drawn]
    on_host = torch.cat([tokens.double(), chances.double()]).tolist()
    tree.set_host_tokens([int(token) for token in on_host[: len(tree)]])
    return dict(zip(first, on_host[len(tree) :], strict=True))


def walk(
    tokens: Sequence[int],
    children: Sequence[Sequence[int]],
    probs: Any,
    target: Any,
    rng: Any,
    chances: Mapping[int, float] = MappingProxyType({}),
) -> Acceptance:
    """Apply the acceptance rule from the root downwards.

    Let p be the target's distribution at a node. Each child, a token x that was drawn from q, is tried in order: it is
    accepted with probability min(1, p[x] / q[x]). If it is rejected, p becomes normalise(relu(p - q)). If all children
    are rejected, or there are none, the next token is drawn from the current p. This is speculative sampling (Leviathan
    et al. 2023, algorithm 1; Chen et al. 2023), extended to siblings by recursive rejection (Miao et al. 2024; Jeon et
    al. 2024). It preserves the target's distribution if q is the distribution that the child was really drawn from,
    given its earlier siblings. A deterministic proposal has a one-hot q.

    The distributions may be any arrays, also of exact fractions: the rule uses only indexing, arithmetic, `clip` and
    `sum`.

    Args:
        tokens: [N] the proposed tokens; node i + 1 proposes ``tokens[i]``.
        children: the children of each of the N + 1 nodes, in the order in which they are tried.
        probs: [N, V] q of each proposal; None if all proposals are deterministic.
        target: [N + 1, V] p at each node.
        rng: gives the coins and the draws, as `Rng` does.
        chances: p[x] / q[x] of some nodes' first children, if they were computed before.

    Returns:
        The accepted path and its tokens.

    Raises:
        SpecDecodeError: no token can be drawn, because p is not finite or has no mass.
    """
    path: list[int] = []
    node = 0
    while True:
        p = target[node]
        for child in children[node]:
            token = tokens[child - 1]
            if probs is None:
                q = p * 0
                q[token] = 1
            else:
                q = probs[child - 1]
            if rng.coin(chances[child] if child in chances else p[token] / q[token]):
                path.append(child)
                node = child
                break
            residual = (p - q).clip(min=0)
            # The residual is zero only if p and q differ by rounding alone. Then p itself is still right.
            p = residual / residual.sum() if residual.sum() > 0 else p
        else:
            return Acceptance(path, [*(tokens[i - 1] for i in path), checked_choice(int(rng.draw(p)))])


def _walk_greedily(tokens: Sequence[int], children: Sequence[Sequence[int]], choices: Sequence[int]) -> Acceptance:
    """Apply `walk` to one-hot target distributions: a child is accepted exactly if it is the target's choice."""
    path: list[int] = []
    node = 0
    while (match := next((c for c in children[node] if tokens[c - 1] == choices[node]), None)) is not None:
        path.append(match)
        node = match
    return Acceptance(path, [*(tokens[i - 1] for i in path), checked_choice(choices[node])])
