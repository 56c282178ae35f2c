"""Proposals from a head on the target's own features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdecode.controllers.base import Limit
from specdecode.core.slots import Slots
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, common_prefix
from specdecode.drafters.tree_shapes import BestFirstTree, Chain, Level, StaticTree, TreeShape, grow_tree
from specdecode.heads.bound import FittedHead, untrained
from specdecode.models.lm import LM, PREFILL_CHUNK


class HeadDrafter:
    """A head of one layer proposes from what some of the target's layers made of the text (EAGLE, Li et al. 2024;
    several layers as in EAGLE-3, Li et al. 2025).

    It reads pairs: the embedding of a token, and the target's features at the token before it. So the first token has
    none. The tokens that it proposes have no features yet, and it reads them with its own state in their place. Only
    pairs with features stay in its slots; a node that was accepted is read again with those.

    Nothing is proposed in the first step, where not all of the prompt has been read by the target.

    Args:
        head: as `load_head` gives it.
        shape: `Chain()`, `StaticTree(...)` or `BestFirstTree(...)`.
    """

    def __init__(self, head: FittedHead, shape: TreeShape = Chain()) -> None:
        self.head = head
        self.shape = shape
        self.forwards = 0
        self._slots = Slots(256, head.tokens.device)
        # Slot i holds the pair of token i + 1.
        self._read: list[int] = []

    @property
    def layers(self) -> tuple[int, ...]:
        return self.head.shape.layers

    @torch.inference_mode()
    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tokens, features = list(context.tokens), context.features
        if features is None or not 0 < len(tokens) - 1 <= len(features):
            return DraftTree.empty()
        state = self._catch_up(tokens, features)
        if context.sampling.greedy and isinstance(self.shape, Chain):
            return DraftTree.chain(self._chain(state, min(limit.depth, limit.nodes)))
        return self._tree(state, context, limit)

    def _catch_up(self, tokens: Sequence[int], features: Float[Tensor, "read F"]) -> Float[Tensor, "1 H"]:
        """Read the pairs that the slots lack, and that of the root in any case, as its state is wanted."""
        known = min(common_prefix(self._read, tokens), len(tokens) - 1)
        self._slots.keep([], after=max(known - 1, 0))
        for start in range(max(known, 1), len(tokens), PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, len(tokens))
            own = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            state = self._forward(
                torch.tensor(tokens[start:end]),
                self.head.fused(features[start - 1 : end - 1]),
                torch.arange(start, end),
                own,
            )
        self._read = list(tokens)
        return state[-1:]

    def _chain(self, state: Float[Tensor, "1 H"], length: int) -> Int[Tensor, " length"]:
        """As the levels of a chain would be, but without laws and without the host."""
        chosen, seen = [self.head.tokens[:0]], torch.ones(1, length, dtype=torch.bool)
        for depth in range(length):
            if depth:
                place = torch.tensor([len(self._read) - 1 + depth])
                state = self._forward(chosen[-1], state, place, seen[:, :depth])
            chosen.append(self.head.tokens[self.head.logits(state).argmax(-1)])
        return torch.cat(chosen)

    def _tree(self, state: Float[Tensor, "1 H"], context: Context, limit: Limit) -> DraftTree:
        """A tree is grown over the tokens that the head can propose, as if there were no others: the law of a token is
        what it would be among all with logits of minus infinity for the rest."""
        rng = None if context.sampling.greedy else context.rng

        def laws() -> Float[Tensor, "rows D"]:
            return context.sampling.probs(self.head.logits(state))

        def read(level: Level, visible: Bool[Tensor, "rows read"], depth: int) -> Float[Tensor, "rows D"]:
            nonlocal state
            places = torch.full((len(level),), len(self._read) - 1 + depth)
            state = self._forward(self.head.tokens[level.tokens], state[list(level.rows)], places, visible)
            return laws()

        _, tree = grow_tree(self.shape, laws(), limit, rng, read)
        if not len(tree):
            return tree
        probs = tree.probs
        if probs is not None:
            whole = probs.new_zeros(len(tree), context.vocab_size)
            probs = whole.index_copy_(1, self.head.tokens, probs)
        return DraftTree(self.head.tokens[tree.tokens], tree.parents, probs)

    def _forward(
        self,
        tokens: Int[Tensor, " n"],
        state: Float[Tensor, "n H"],
        positions: Int[Tensor, " n"],
        visible: Bool[Tensor, "n m"],
    ) -> Float[Tensor, "n H"]:
        """The states at tokens that take the next slots; of the last m slots each sees those that `visible` marks, and
        all before these."""
        self.forwards += 1
        device = self._slots.device
        positions = positions.to(device, non_blocking=True)
        self._slots.append(positions)
        before = torch.ones(len(positions), self._slots.length - visible.shape[1], dtype=torch.bool)
        return self.head.read(
            tokens.to(device, non_blocking=True),
            state,
            positions,
            lambda keys, values: self._slots.update(keys, values, 0),
            torch.cat([before, visible], 1).to(device, non_blocking=True),
        )


def examples(target: LM) -> dict[str, HeadDrafter]:
    head = FittedHead(untrained(target), target)
    return {
        "head-chain": HeadDrafter(head),
        "head-static-tree": HeadDrafter(head, StaticTree((3, 2, 1))),
        "head-best-first-tree": HeadDrafter(head, BestFirstTree(nodes=12, threshold=0.001)),
    }
