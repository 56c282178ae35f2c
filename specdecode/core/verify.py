"""Verification: which proposals are accepted, and the token after them. There is one acceptance rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.core.sampling import Rng, checked_choice
from specdecode.core.transfer import moved
from specdecode.core.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Hold the result of verifying a tree: what the step may commit.

    Attributes:
        path: the accepted nodes, from a child of the root downwards; the root (node 0) is not listed.
        next_token: the target's own token after them: the bonus if the path ends at a leaf, else the correction.
        tokens: the accepted tokens and, last, `next_token`.
    """

    path: list[int]
    tokens: list[int]

    @property
    def next_token(self) -> int:
        return self.tokens[-1]


def accept(tree: DraftTree, target: Float[Tensor, "nodes V"] | Int[Tensor, " nodes"], rng: Rng) -> Acceptance:
    """Verify a tree against the target's distributions at its root and at each node.

    Args:
        tree: N proposals.
        target: row i is the distribution of the token after node i. Where all are one-hot, as in greedy decoding, the
            token of each row is enough.
        rng: the randomness of this generation; one-hot distributions need none.

    Raises:
        SpecDecodeError: the target's logits are not finite where it must choose a token.
    """
    if target.ndim == 1:
        # One transfer carries everything that the host needs of a greedy step.
        on_host = torch.cat([target, moved(tree.tokens, target.device)]).tolist()
        tree.set_host_tokens(on_host[len(target) :])
        return _walk_greedily(tree.host_tokens, tree.children(), on_host[: len(target)])
    return walk(tree.host_tokens, tree.children(), tree.probs, target, rng)


def walk(tokens: Sequence[int], children: Sequence[Sequence[int]], probs: Any, target: Any, rng: Any) -> Acceptance:
    """Apply the acceptance rule from the root downwards.

    At a node, for each child in order: accept with probability min(1, p[x] / q[x]); otherwise p becomes
    normalise(relu(p - q)). With no child left, the next token is drawn from the remaining p. This is speculative
    sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023), extended to siblings by recursive rejection (Miao
    et al. 2024; Jeon et al. 2024). It preserves the target's distribution if q is the distribution that the child was
    really drawn from, given its earlier siblings. A deterministic proposal has a one-hot q.

    The distributions may be any arrays, exact fractions included: the rule needs indexing, arithmetic, `clip` and
    `sum` only.
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
            if rng.coin(p[token] / q[token]):
                path.append(child)
                node = child
                break
            residual = (p - q).clip(min=0)
            # Nothing remains only where p and q differ by rounding alone: then p itself is still right.
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
