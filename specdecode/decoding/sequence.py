"""The state of one sequence during decoding: all parts of the loop except the target's forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.backends.graph import CudaGraphs, clock
from specdecode.controllers.adaptive import AdaptiveK
from specdecode.controllers.base import FixedK, Limit
from specdecode.core.errors import SpecDecodeError
from specdecode.core.result import Generation, Step
from specdecode.core.sampling import most_probable
from specdecode.core.slots import SlotBatch
from specdecode.core.transfer import moved, picked
from specdecode.core.tree import DraftTree
from specdecode.core.verify import accept
from specdecode.decoding.request import Request
from specdecode.drafters.base import Context, slots_for
from specdecode.models.forwards import prefill_chunk
from specdecode.policies.base import boundary

# Controllers that ignore the times of a step. With them, processes that decode together need not agree on the times.
_WITHOUT_CLOCK = (FixedK, AdaptiveK)


class SequenceState:
    """The decoding state of one request, which advances step by step.

    A step is a call of `propose`, the target's forward over `pending` and the tree, and a call of `commit`. The caller
    runs the forward, which several sequences may share.

    Args:
        request: the request to decode.
        in_batch: whether the sequence will join a `SlotBatch`.

    Attributes:
        slots: slots of the target. They hold all committed tokens except the pending and the evicted tokens.
        finished: whether a stop or the length limit was reached.
        evicted_at: number of tokens that the target had read at the last eviction; None before the first eviction.
        result: the generation so far.
    """

    def __init__(self, request: Request, *, in_batch: bool = False) -> None:
        self._request = request
        self._tokens = list(request.tokens)
        self._rng = request.sampling.rng(request.target.ranks)
        target, length = request.target, len(self._tokens)
        capacity = slots_for(length, request.length_limit, request.policy)
        self.slots = SlotBatch.new_row(capacity, target.device) if in_batch else target.new_slots(capacity)
        self._read = 0  # number of tokens that the target has read; at least the root is still pending
        self._hidden_states: Tensor | None = None  # [capacity, F] states at the tokens read so far, for the drafter
        self.evicted_at: int | None = None
        self.finished = False
        self.result = Generation(prompt_tokens=length, logprobs=[] if request.logprobs else None)

    @property
    def layers(self) -> tuple[int, ...]:
        """The target's layers whose hidden states the drafter reads."""
        return self._request.drafter.layers

    @property
    def chunk(self) -> int:
        """Largest number of prompt tokens in one forward."""
        return prefill_chunk(self._request.policy)

    @property
    def pending(self) -> list[int]:
        """Committed tokens that the target has not read yet. The last is the root."""
        return self._tokens[self._read :]

    @property
    def needs_only_choices(self) -> bool:
        """Whether `commit` needs only the most probable tokens of the target's forward, not its logits."""
        return self._request.sampling.greedy and self.result.logprobs is None

    def prefill(self, leave: int) -> None:
        """Read the prompt except its last tokens, in chunks. If the policy evicts within those, read up to there too.

        Args:
            leave: largest number of tokens at the end of the prompt to leave for the first step, at least 1.
        """
        started = clock()
        while True:
            left, ahead = len(self._tokens) - self._read, self._boundary() - self._read
            if left <= min(leave, ahead):
                break
            chunk = min(self.chunk, ahead, left - 1)
            text = torch.tensor(self._tokens[self._read : self._read + chunk])
            self._request.target.forward(self.slots, text, rows=0)
            self._record(range(chunk))
            self._read += chunk
            self.result.prefill_forwards += 1
            self.result.prefill_compressions += self._evict()
        self.result.prefill_forwards_s = clock() - started

    def propose(self) -> DraftTree:
        """Return the tree for the next forward of the target to verify."""
        request = self._request
        self._step_started = clock()
        self._forwards_before = request.drafter.forwards
        limit = request.controller.limit()
        # The target adds its own token, so the last token of the limit need not be drafted. No step may pass the length
        # at which the policy evicts: otherwise the output would depend on the accepted drafts.
        length = len(self._tokens)
        self._allowed = min(request.length_limit - length - 1, self._boundary() - length)
        depth = min(limit.depth, self._allowed)
        tree = DraftTree.empty()
        if depth > 0:
            tree = request.drafter.propose(self._context(), Limit(depth, limit.nodes))
        if tree.depth > depth:
            tree = tree.clip(depth)
        self._proposed_at = clock()
        return tree

    def commit(
        self,
        tree: DraftTree,
        output: Float[Tensor, "nodes V"] | Int[Tensor, " nodes"],
        forward_started: float,
        forced: Int[Tensor, " nodes"] | None = None,
    ) -> list[int]:
        """Commit the accepted tokens of the tree and the target's own token, and end the step.

        If a proposal overflows in the target, its NaN may reach the rows beside it: attention gives it the weight zero,
        and zero times NaN is NaN. Then the step is made again without proposals, as in plain decoding.

        Args:
            tree: the proposal.
            output: the target's logits at the root and at each node of the tree. If `needs_only_choices`, it may be
                the most probable tokens there.
            forward_started: start of the target's forward, by `clock`.
            forced: under teacher forcing, the token of the known text after the root and after each node. It replaces
                the target's choice.

        Returns:
            The nodes whose logits decided the committed tokens, one for each token; 0 is the root.
        """
        request, slots, stem = self._request, self.slots, len(self.pending)
        peak_bytes = slots.bytes_held
        slot_bytes = peak_bytes // slots.length
        attended_bytes = slot_bytes * slots.attended
        decisions = self._decisions(output) if forced is None else forced
        slots.storage.unchecked = True
        try:
            acceptance = accept(tree, decisions, self._rng)
        except SpecDecodeError:  # logits that decide are not finite
            root = decisions[0]
            # At an accepted proposal plain decoding fails, too. A retry would draw again what the coins have decided.
            if not len(tree) or (root.isfinite().all() if root.ndim else root >= 0):
                raise
            return self.commit(DraftTree.empty(), self._without(tree), forward_started)
        slots.storage.unchecked = forced is not None
        verified_at = clock()

        self._keep_accepted(acceptance.path, stem, len(tree))
        emitted = self._append(acceptance.tokens)
        decided_at = [0, *acceptance.path[: len(emitted) - 1]]
        if self.result.logprobs is not None:
            self.result.logprobs += _logprobs(output, decided_at, emitted)
        evicts = not self.finished and self._evict()

        ended_at = clock()
        step = Step(
            drafted=len(tree),
            depth=tree.depth,
            rows=stem + len(tree),
            accepted=min(len(acceptance.path), len(emitted)),
            emitted=len(emitted),
            draft_forwards=request.drafter.forwards - self._forwards_before,
            draft_s=self._proposed_at - self._step_started,
            verify_s=verified_at - forward_started,
            total_s=ended_at - self._step_started,
            allowed=self._allowed,
            cache_bytes=slot_bytes * slots.length,
            peak_cache_bytes=peak_bytes,
            attended_bytes=attended_bytes,
            compressions=int(evicts),
        )
        self._end_step(step, emitted, ended_at)
        return decided_at

    def _decisions(
        self, output: Float[Tensor, "nodes V"] | Int[Tensor, " nodes"]
    ) -> Float[Tensor, "nodes V"] | Int[Tensor, " nodes"]:
        """Return what `accept` compares the tree with: the most probable tokens, or when sampling the distributions."""
        sampling = self._request.sampling
        if output.ndim == 1:
            assert sampling.greedy
            return output
        return most_probable(output) if sampling.greedy else sampling.probs(output)

    def _without(self, tree: DraftTree) -> Float[Tensor, "1 V"] | Int[Tensor, " 1"]:
        """Take back the last forward, of the pending tokens and a tree. Make it without the tree, and return its output
        at the root."""
        target = self._request.target
        self.result.retries += 1
        self.slots.keep([], after=self.slots.length - len(self.pending) - len(tree))
        self.slots.erase_dropped()
        return target.forward_tree(self.slots, self.pending, DraftTree.empty(), choose=self.needs_only_choices)

    def _context(self) -> Context:
        """Return the drafter's input. In the first step it has no hidden states: the part of the prompt that was read
        before must not change the proposal."""
        first = not self.result.steps
        states = None if first else self._hidden_states
        return Context(
            self._tokens,
            self._request.target.vocab_size,
            self._request.sampling,
            self._rng,
            None if states is None else states[: self._read],
            first,
            self._request.length_limit,
        )

    def _keep_accepted(self, path: Sequence[int], stem: int, nodes: int) -> None:
        """Keep the slots of the accepted path, and record its rows and those of the pending tokens.

        Args:
            path: accepted nodes.
            stem: number of pending tokens of the forward.
            nodes: number of nodes of the tree.
        """
        self._record([*range(stem), *(stem - 1 + node for node in path)])
        root = self.slots.length - nodes - 1
        self.slots.keep([root + node for node in path], after=root + 1)

    def _append(self, tokens: Sequence[int]) -> list[int]:
        """Commit tokens up to the first one that ends the text. Return the committed tokens."""
        emitted = list(tokens)
        stop = self._request.stops.find(self._tokens, emitted)
        if stop is not None:
            del emitted[stop + 1 :]
            self.result.finish_reason = "stop"
        self.result.tokens += emitted
        self._tokens += emitted
        self._read = len(self._tokens) - 1
        self.finished = stop is not None or len(self._tokens) == self._request.length_limit
        return emitted

    def _end_step(self, step: Step, emitted: list[int], ended_at: float) -> None:
        """Store the step, update the times of the result, and call the controller and `on_step`."""
        request, result = self._request, self.result
        result.steps.append(step)
        looks_at_times = not isinstance(request.controller, _WITHOUT_CLOCK)
        request.controller.observe(request.target.ranks.agreed(step) if looks_at_times else step)
        result.capture_s = CudaGraphs.seconds - request.start.capture_s
        if len(result.steps) == 1:
            result.prefill_s = ended_at - request.start.at
        if request.on_step is not None:
            request.on_step(emitted)
        result.decode_s = clock() - request.start.at - result.prefill_s

    def _record(self, rows: Sequence[int]) -> None:
        """Record attention for the policy and hidden states for the drafter, from the last forward.

        Args:
            rows: rows of the forward that belong to committed tokens.
        """
        if self._request.policy.reads_attention:
            self.slots.attend(rows)
        if not self.layers:
            return
        new = picked(self.slots.hidden_states(self.layers), rows)
        states, end = new[:0] if self._hidden_states is None else self._hidden_states, self._read + len(new)
        if end > len(states):
            wider = new.new_empty(max(end, 2 * len(states)), new.shape[1])
            wider[: self._read] = states[: self._read]
            self._hidden_states = states = wider
        states[self._read : end] = new

    def _evict(self) -> bool:
        """Evict at a boundary of the policy. Return whether an eviction took place."""
        evicts = self._request.target.evict(self.slots, self._request.policy)
        if evicts:
            self.evicted_at = self._read
        return evicts

    def _boundary(self) -> int:
        """Return the next committed length at which the policy evicts, beyond the present length."""
        return boundary(self._request.policy, self.slots.committed + 1, self.slots.length + 1)


def _logprobs(logits: Float[Tensor, "nodes V"], nodes: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Return the log-probabilities of tokens, each at its node."""
    logprobs = picked(logits, nodes).double().log_softmax(-1)
    chosen: list[float] = logprobs.gather(1, moved(torch.tensor(tokens), logprobs.device)[:, None])[:, 0].tolist()
    return chosen
