"""A drafter that is a head on the target's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdecode.controllers.base import Limit
from specdecode.core.slots import Slots
from specdecode.core.transfer import moved, picked
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, common_prefix
from specdecode.drafters.tree_shapes import BestFirstTree, Chain, Level, StaticTree, TreeShape, grow_tree
from specdecode.heads.bound import BoundHead, untrained
from specdecode.models.lm import LM, PREFILL_CHUNK


class HeadDrafter:
    """Propose with a head of one layer on the target's hidden states after some layers (EAGLE, Li et al. 2024; several
    layers as in EAGLE-3, Li et al. 2025).

    The head reads pairs: the embedding of a token, and the target's hidden states at the token before it. So there is
    no pair for the first token. Proposed tokens have no hidden states of the target yet: the head's own state takes
    their place. Only pairs with the target's hidden states stay in its slots; an accepted node is read again with them.

    In the first step it proposes nothing, since the target has not yet read the whole prompt.

    Args:
        head: of `load_head`.
        shape: `Chain()`, `StaticTree(...)` or `BestFirstTree(...)`.
    """

    def __init__(self, head: BoundHead, shape: TreeShape = Chain()) -> None:
        self.head = head
        self.shape = shape
        self.forwards = 0
        self._slots = Slots(256, head.tokens.device)
        # Tokens read. Slot i holds the pair of token i + 1.
        self._read: list[int] = []

    @property
    def layers(self) -> tuple[int, ...]:
        return self.head.layers

    @torch.inference_mode()
    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tokens, hidden_states = list(context.tokens), context.hidden_states
        if hidden_states is None or not 0 < len(tokens) - 1 <= len(hidden_states):
            return DraftTree.empty()
        state = self._catch_up(tokens, hidden_states)
        if context.sampling.greedy and isinstance(self.shape, Chain):
            return DraftTree.chain(self._chain(state, min(limit.depth, limit.nodes)))
        return self._tree(state, context, limit)

    def _catch_up(self, tokens: Sequence[int], hidden_states: Float[Tensor, "read F"]) -> Float[Tensor, "1 H"]:
        """Read the pairs that the slots lack, and always that of the root; return the state at the root."""
        shared = min(common_prefix(self._read, tokens), len(tokens) - 1)
        self._slots.keep([], after=max(shared - 1, 0))
        for start in range(max(shared, 1), len(tokens), PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, len(tokens))
            state = self._forward(
                torch.tensor(tokens[start:end]),
                self.head.fused(hidden_states[start - 1 : end - 1]),
                torch.arange(start, end),
                torch.ones(end - start, end - start, dtype=torch.bool).tril(),
            )
        self._read = list(tokens)
        return state[-1:]

    def _chain(self, state: Float[Tensor, "1 H"], length: int) -> Int[Tensor, " length"]:
        """Return the head's greedy continuation, made on the device without distributions."""
        chosen, visible = [self.head.tokens[:0]], torch.ones(1, length, dtype=torch.bool)
        for depth in range(length):
            if depth:
                position = torch.tensor([len(self._read) - 1 + depth])
                state = self._forward(chosen[-1], state, position, visible[:, :depth])
            chosen.append(self.head.tokens[self.head.logits(state).argmax(-1)])
        return torch.cat(chosen)

    def _tree(self, state: Float[Tensor, "1 H"], context: Context, limit: Limit) -> DraftTree:
        """Grow a tree over the D tokens that the head can propose. All other tokens have probability 0, as if their
        logits were minus infinity."""
        rng = None if context.sampling.greedy else context.rng

        def distributions() -> Float[Tensor, "rows D"]:
            return context.sampling.probs(self.head.logits(state))

        def read(level: Level, visible: Bool[Tensor, "rows read"], depth: int) -> Float[Tensor, "rows D"]:
            nonlocal state
            positions = torch.full((len(level),), len(self._read) - 1 + depth)
            state = self._forward(self.head.tokens[level.tokens], picked(state, level.rows), positions, visible)
            return distributions()

        _, tree = grow_tree(self.shape, distributions(), limit, rng, read)
        if not len(tree):
            return tree
        probs = tree.probs
        if probs is not None:
            full = probs.new_zeros(len(tree), context.vocab_size)
            probs = full.index_copy_(1, self.head.tokens, probs)
        return DraftTree(self.head.tokens[tree.tokens], tree.parents, probs)

    def _forward(
        self,
        tokens: Int[Tensor, " n"],
        state: Float[Tensor, "n H"],
        positions: Int[Tensor, " n"],
        visible: Bool[Tensor, "n m"],
    ) -> Float[Tensor, "n H"]:
        """Return the states at tokens, which take the next slots.

        Each token attends to those of the last m slots that `visible` marks, and to all slots before these.
        """
        self.forwards += 1
        device = self._slots.device
        positions = moved(positions, device)
        self._slots.append(positions)
        before = torch.ones(len(positions), self._slots.length - visible.shape[1], dtype=torch.bool)
        return self.head.read(
            moved(tokens, device),
            state,
            positions,
            self._slots.update,
            moved(torch.cat([before, visible], 1), device),
        )


def examples(target: LM) -> dict[str, HeadDrafter]:
    head = BoundHead(untrained(target), target)
    return {
        "head-chain": HeadDrafter(head),
        "head-static-tree": HeadDrafter(head, StaticTree((3, 2, 1))),
        "head-best-first-tree": HeadDrafter(head, BestFirstTree(nodes=12, threshold=0.001)),
    }
