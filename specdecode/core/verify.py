"""Acceptance: which of the proposals are kept, and the token that follows them. There is one rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.core.sampling import Rng, checked_choice
from specdecode.core.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step may commit.

    Attributes:
        path: the accepted nodes from the root's child down (the root, node 0, is not listed).
        next_token: the token after them, chosen by the target itself: the bonus where everything on the path was
            accepted, else the correction.
        tokens: the accepted tokens and, last, `next_token`.
    """

    path: list[int]
    tokens: list[int]

    @property
    def next_token(self) -> int:
        return self.tokens[-1]


def accept(tree: DraftTree, target: Float[Tensor, "nodes V"] | Int[Tensor, " nodes"], rng: Rng) -> Verdict:
    """Verify a tree against the target's law at its root and at each of its nodes.

    Args:
        tree: N proposals.
        target: row i is the law of the token after node i. Where every law is one-hot, as in greedy decoding, the
            token of each is enough: the rule then follows the target's tokens as far as the tree holds them.
        rng: the randomness of this generation; one-hot laws need none.

    Raises:
        SpecDecodeError: the target's logits are not finite where it must choose a token.
    """
    if target.ndim == 1:
        # One transfer carries all that the host must learn of a greedy step.
        known = torch.cat([target, tree.tokens.to(target.device, non_blocking=True)]).tolist()
        tree.know(known[len(target) :])
        return _follow(tree.known, tree.children(), known[: len(target)])
    return walk(tree.known, tree.children(), tree.probs, target, rng)


def walk(tokens: Sequence[int], children: Sequence[Sequence[int]], probs: Any, target: Any, rng: Any) -> Verdict:
    """The acceptance rule.

    At a node, for each child in order: accept with probability min(1, p[x] / q[x]); otherwise
    p becomes normalise(relu(p - q)). With no child left, the next token is drawn from what p has become. This is
    speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023) carried over siblings by recursive
    rejection (Miao et al. 2024; Jeon et al. 2024). It leaves the target's law untouched if q is the law that the child
    was really drawn from, given its earlier siblings. A deterministic proposal has a one-hot q.

    Any array will do for the laws, exact fractions too: only indexing, arithmetic, `clip` and `sum` are asked of them.
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
            # Nothing remains only where p and q differ by rounding alone: p is then the law still.
            p = residual / residual.sum() if residual.sum() > 0 else p
        else:
            return Verdict(path, [*(tokens[i - 1] for i in path), checked_choice(int(rng.draw(p)))])


def _follow(tokens: Sequence[int], children: Sequence[Sequence[int]], choices: Sequence[int]) -> Verdict:
    """`walk` for one-hot target laws: a child is accepted if and only if it is the target's choice."""
    path: list[int] = []
    node = 0
    while (match := next((c for c in children[node] if tokens[c - 1] == choices[node]), None)) is not None:
        path.append(match)
        node = match
    return Verdict(path, [*(tokens[i - 1] for i in path), checked_choice(choices[node])])
