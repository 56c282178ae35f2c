"""A drafter with a head on the target's hidden states."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specdecode.controllers.base import Limit
from specdecode.core.slots import Slots
from specdecode.core.transfer import picked
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, common_prefix, slots_for
from specdecode.drafters.tree_shapes import BestFirstTree, Chain, Level, StaticTree, TreeShape, grow_tree
from specdecode.heads.bound import BoundHead, untrained
from specdecode.models.forwards import PREFILL_CHUNK, ForwardInput
from specdecode.models.lm import LM


class HeadDrafter:
    """A drafter with a head on the target's hidden states after some layers (EAGLE-3, Li et al. 2025).

    The head reads pairs: the embedding of a token, and the target's hidden states at the token before it. So there is
    no pair for the first token. The target has no hidden states for proposed tokens yet, so the head's own state is
    used there. Only pairs with the target's hidden states stay in the head's slots: an accepted node is read again with
    the target's hidden states.

    In the first step it proposes nothing, since the target may not have read the whole prompt.

    Args:
        head: the result of `load_head` or `load_mtp`.
        shape: shape of the trees: `Chain()`, `StaticTree(...)` or `BestFirstTree(...)`.

    Attributes:
        forwards: number of forwards of the head so far.
        layers: the target's layers whose hidden states the head reads.

    Raises:
        ValueError: the head is not bound to a target.
    """

    def __init__(self, head: BoundHead, shape: TreeShape = Chain()) -> None:
        if not isinstance(head, BoundHead):
            raise ValueError(f"the head is a {type(head).__name__}: give load_head(name, target) or load_mtp(target)")
        self.head = head
        self.shape = shape
        self.forwards = 0
        self._slots = Slots(0, head.tokens.device)
        # The tokens read so far. Slot i holds the pair of token i + 1.
        self._read: list[int] = []

    @property
    def layers(self) -> tuple[int, ...]:
        return self.head.layers

    @torch.inference_mode()
    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tokens, hidden_states = list(context.tokens), context.hidden_states
        if hidden_states is None or not 0 < len(tokens) - 1 <= len(hidden_states):
            return DraftTree.empty()
        shared = min(common_prefix(self._read, tokens), len(tokens) - 1)
        if max(tokens[max(shared, 1) :]) >= self.head.vocab_size:
            return DraftTree.empty()
        self._slots.keep([], after=max(shared - 1, 0))
        self._read = tokens[:shared]
        capacity = slots_for(len(tokens), context.length_limit)
        if not self._slots.length and self._slots.capacity < capacity:
            self._slots = self.head.new_slots(capacity)
        chain = min(limit.depth, limit.nodes) if context.sampling.greedy and isinstance(self.shape, Chain) else 0
        for start in range(max(shared, 1), len(tokens), PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, len(tokens))
            causal = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            pairs = ForwardInput(torch.tensor(tokens[start:end]), torch.arange(start, end), causal, rows=1)
            before = hidden_states[start - 1 : end - 1]
            if end == len(tokens) and chain:
                self.forwards += chain
                drafted = self.head.continue_greedily(self._slots, pairs, before, chain)
                self._read = tokens
                return DraftTree.chain(drafted)
            self.forwards += 1
            state, logits = self.head.read(self._slots, pairs, before, fuse=True)
            self._read = tokens[:end]
        return self._tree(state, logits, context, limit)

    def _tree(
        self, state: Float[Tensor, "1 H"], logits: Float[Tensor, "1 D"], context: Context, limit: Limit
    ) -> DraftTree:
        """Grow a tree from the D tokens that the head can propose. All other tokens have probability 0.

        Args:
            state: the head's state at the root.
            logits: the head's logits of the token after the root.
            context: the input of the proposal.
            limit: largest depth and number of nodes of the tree.
        """
        rng = None if context.sampling.greedy else context.rng

        def read(level: Level, visible: Bool[Tensor, "rows read"], depth: int) -> Float[Tensor, "rows D"]:
            nonlocal state
            self.forwards += 1
            count, position = len(level), len(self._read) - 1 + depth
            nodes = ForwardInput(self.head.tokens[level.tokens], torch.full((count,), position), visible, rows=count)
            state, logits = self.head.read(self._slots, nodes, picked(state, level.rows))
            return context.sampling.probs(logits)

        grown, places = grow_tree(self.shape, context.sampling.probs(logits), limit, rng, read)
        tree = grown.subset(places)
        if not len(tree):
            return tree
        probs = tree.probs
        if probs is not None:
            full = probs.new_zeros(len(tree), context.vocab_size)
            probs = full.index_copy_(1, self.head.tokens, probs)
        return DraftTree(self.head.tokens[tree.tokens], tree.parents, probs)


def examples(target: LM) -> dict[str, HeadDrafter]:
    head = BoundHead(untrained(target), target)
    return {
        "head-chain": HeadDrafter(head),
        "head-static-tree": HeadDrafter(head, StaticTree((3, 2, 1))),
        "head-best-first-tree": HeadDrafter(head, BestFirstTree(nodes=12, threshold=0.001)),
    }
