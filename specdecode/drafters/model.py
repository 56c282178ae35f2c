"""A drafter that is a smaller language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.controllers.base import Limit
from specdecode.core.slots import Slots
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, common_prefix, slots_for
from specdecode.drafters.tree_shapes import BestFirstTree, Chain, Level, StaticTree, TreeShape, grow_tree
from specdecode.models.arguments import check_cache_fits, check_lm
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy, boundary
from specdecode.policies.keep_all import KeepAll
from specdecode.policies.sink_window import SinkWindow

# Tokens that a step commits behind the slots of an earlier chain: the target's own token, and before it the chain's
# last one, which the draft has not read. They are read in one graph with the next chain.
_STEP_TOKENS = 2


class ModelDrafter:
    """A drafter with a draft model, which has its own KV slots.

    After a proposal the slots hold the text that the draft has read (after evictions, only the kept tokens), and then
    the nodes of the tree. At the next proposal the nodes on the committed path stay, and only the tokens after them are
    read. The draft reads the prompt after the first token is committed.

    Args:
        draft: a model with the target's vocabulary (`specdecode.load(..., target=...)` checks it).
        shape: shape of the trees: `Chain()`, `StaticTree(...)` or `BestFirstTree(...)`.
        policy: chooses the tokens that stay in the draft's own cache. Evictions depend on the length of the text alone,
            so that a fresh drafter and a used one propose the same tree.

    Attributes:
        forwards: number of forwards of the draft so far.

    Raises:
        ValueError: the draft is no `LM`, or its context cannot hold the policy's cache. Or the policy chooses by
            attention, which is not recorded during drafting.
        UnsupportedModelError: the policy evicts, but the draft's keys cannot be re-rotated.
    """

    layers = ()

    def __init__(self, draft: LM, shape: TreeShape = Chain(), policy: CachePolicy = KeepAll()) -> None:
        if policy.reads_attention:
            raise ValueError("a draft's cache cannot be kept by attention: use a policy that chooses by place or key")
        check_lm("draft", draft)
        check_cache_fits(policy, draft)
        self.draft = draft
        self.shape = shape
        self.policy = policy
        self.forwards = 0
        self._forget()

    def _forget(self) -> None:
        self._slots = Slots(0, self.draft.device)
        self._read: list[int] = []
        self._grown = self._proposed = DraftTree.empty()
        self._places: list[int] = []

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        if context.first:
            return DraftTree.empty()
        tokens = list(context.tokens)
        pending = self._synchronise(tokens)
        full = not self.policy.interval and len(tokens) >= self.draft.context_length
        if full or max(pending) >= self.draft.vocab_size:
            return DraftTree.empty()
        capacity = slots_for(len(tokens), context.length_limit, self.policy)
        if not self._slots.length and self._slots.capacity < capacity:
            self._slots = self.draft.new_slots(capacity)
        greedy_chain = context.sampling.greedy and isinstance(self.shape, Chain)
        if greedy_chain and len(pending) <= _STEP_TOKENS and not self.policy.interval:
            length = min(limit.depth, limit.nodes, self.draft.context_length - len(tokens))
            if length < 1:
                return DraftTree.empty()
            drafted = self._continued(torch.tensor(pending), context, length)
            self._read = tokens
            return self._as_chain(drafted)
        logits, forwards = self.draft.read(self._slots, pending, self.policy)
        self.forwards += forwards
        self._read = tokens
        limit = Limit(min(limit.depth, self.draft.context_length - self._slots.length), limit.nodes)
        if greedy_chain:
            first, length = logits[:, : context.vocab_size].argmax(-1), min(limit.depth, limit.nodes)
            others = [self._continued(first, context, length - 1)] if length > 1 else []
            return self._as_chain(torch.cat([first[:length], *others]))
        rng = None if context.sampling.greedy else context.rng

        def read(level: Level, visible: Tensor, depth: int) -> Tensor:
            return self._distributions(self._forward(level.tokens, visible, depth), context)

        self._grown, self._places = grow_tree(self.shape, self._distributions(logits, context), limit, rng, read)
        self._proposed = self._grown.subset(self._places)
        return self._proposed

    def _continued(self, tokens: Int[Tensor, " n"], context: Context, length: int) -> Int[Tensor, " length"]:
        """Read tokens. Return the draft's greedy continuation, computed on the device without distributions."""
        self.forwards += length
        return self.draft.continue_greedily(self._slots, tokens, length, context.vocab_size)

    def _as_chain(self, drafted: Int[Tensor, " length"]) -> DraftTree:
        self._grown = self._proposed = DraftTree.chain(drafted)
        self._places = list(range(len(drafted)))
        return self._grown

    def _forward(self, tokens: Tensor, visible: Tensor, depth: int) -> Float[Tensor, "rows V"]:
        self.forwards += 1
        position = len(self._read) - self._slots.evicted - 1 + depth
        return self.draft.forward(
            self._slots,
            tokens,
            positions=torch.full((len(tokens),), position),
            visible=visible,
            rows=len(tokens),
        )

    def _distributions(self, logits: Float[Tensor, "rows W"], context: Context) -> Float[Tensor, "rows V"]:
        """Return the draft's distributions over the target's vocabulary. The width W of the draft's logits may differ,
        as vocabularies are padded to round sizes."""
        distributions = context.sampling.probs(logits[:, : context.vocab_size])
        return torch.nn.functional.pad(distributions, (0, context.vocab_size - distributions.shape[1]))

    def _synchronise(self, tokens: Sequence[int]) -> Sequence[int]:
        """Keep only the slots that hold a prefix of the text. Nodes of the last tree may be part of it.

        Returns:
            The tokens that the draft has yet to read. The root is always among them, since its logits are needed.
        """
        shared = min(common_prefix(self._read, tokens), len(tokens) - 1)
        if shared < self._evicted_at():
            self._forget()  # an eviction cannot be rolled back
            shared = 0
        path: list[int] = []
        start = shared - self._slots.evicted  # the first slot after the shared prefix
        if shared == len(self._read) > 0:
            grown, children = list(self._grown.host_tokens), self._grown.children()
            # `ReplayDrafter` may have written other tokens into the proposal, as if the draft had chosen them.
            for place, token in zip(self._places, self._proposed.host_tokens, strict=True):
                grown[place] = token
            in_slots = self._slots.length - start
            # Tokens after the next eviction must be read after it, so their nodes do not stay.
            last = min(len(tokens) - 1, boundary(self.policy, shared, start))
            node: int | None = 0
            for token in tokens[shared:last]:
                node = next((c for c in children[node or 0] if c <= in_slots and grown[c - 1] == token), None)
                if node is None:
                    break
                path.append(start - 1 + node)
        self._slots.keep(path, after=start)
        self._read = list(tokens[: shared + len(path)])
        self._grown = self._proposed = DraftTree.empty()
        self._places = []
        return tokens[shared + len(path) :]

    def _evicted_at(self) -> int:
        """Return the length of the text at the last eviction, which left `policy.keeps` tokens; 0 before any
        eviction."""
        return self._slots.evicted + self.policy.keeps if self._slots.evicted else 0


def examples(target: LM) -> dict[str, ModelDrafter]:
    draft = target.subset(range(max(target.config.num_hidden_layers // 2, 1)))
    return {
        "model-chain": ModelDrafter(draft),
        "model-static-tree": ModelDrafter(draft, StaticTree((3, 2, 1))),
        "model-sink-window": ModelDrafter(draft, policy=SinkWindow(13, sinks=2, interval=4)),
        "model-best-first-tree": ModelDrafter(draft, BestFirstTree(nodes=12, threshold=0.01)),
    }
