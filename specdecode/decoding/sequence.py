"""One sequence that is being decoded: all of the loop but the target's forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.backends.graph import CudaGraphs
from specdecode.controllers.base import MAX_DRAFT_NODES, Controller, Limit
from specdecode.core.result import Generation, Step
from specdecode.core.sampling import Sampling, most_probable
from specdecode.core.stopping import Stops
from specdecode.core.tree import DraftTree
from specdecode.core.verify import accept
from specdecode.drafters.base import Context, Drafter
from specdecode.models.lm import LM, PREFILL_CHUNK
from specdecode.policies.base import CachePolicy, boundary

# Slots taken at the start for tokens to come; more are taken by doubling.
_AHEAD = 2048


class SequenceState:
    """One text that is being decoded: all of the loop but the target's forward, which others may share."""

    def __init__(
        self,
        target: LM,
        prompt: Sequence[int] | Int[Tensor, " n"],
        drafter: Drafter,
        controller: Controller,
        policy: CachePolicy,
        sampling: Sampling,
        max_new_tokens: int,
        stops: Stops,
        logprobs: bool,
        on_step: Callable[[list[int]], None] | None,
    ) -> None:
        self._started = time.perf_counter()
        self._captured_s = CudaGraphs.seconds
        self._tokens = [int(token) for token in prompt]
        check_request(target, self._tokens, max_new_tokens, policy, controller)
        self._target = target
        self._drafter = drafter
        self._controller = controller
        self._policy = policy
        self._sampling = sampling
        self._rng = sampling.rng()
        self._stops = stops
        self._on_step = on_step
        self._end = len(self._tokens) + max_new_tokens
        most = policy.keeps + policy.interval if policy.interval else min(self._end, len(self._tokens) + _AHEAD)
        self.slots = target.new_slots(most + MAX_DRAFT_NODES)
        self._read = 0  # tokens that went through the target; the rest are pending, the root at least
        self._features: Tensor | None = None  # [capacity, F] of these
        self.evicted: int | None = None  # tokens that had been read when the policy evicted last
        self.finished = False
        self.result = Generation(prompt_tokens=len(self._tokens), logprobs=[] if logprobs else None)

    @property
    def layers(self) -> tuple[int, ...]:
        """The target's whose outputs the drafter reads."""
        return self._drafter.layers

    @property
    def pending(self) -> list[int]:
        """The committed tokens that the slots lack; the last is the root."""
        return self._tokens[self._read :]

    def prefill(self, but: int) -> None:
        """Read the prompt, as far as it is longer than `but` tokens or than the policy lets one forward be."""
        started = time.perf_counter()
        while (left := len(self._tokens) - self._read) > min(but, ahead := self._boundary() - self._read):
            chunk = min(PREFILL_CHUNK, ahead, left - 1)
            self._target.forward(self.slots, torch.tensor(self._tokens[self._read : self._read + chunk]))
            self._keep(range(chunk))
            self._read += chunk
            self.result.prefill_forwards += 1
            self.result.prefill_compressions += self._evict()
        self.result.prefill_forwards_s = time.perf_counter() - started

    def propose(self) -> DraftTree:
        """What the next forward of the target is to verify."""
        self._step_started = time.perf_counter()
        self._forwards_before = self._drafter.forwards
        limit = self._controller.limit()
        # The target adds a token of its own, so the last one asked for need not be drafted; and no step may pass the
        # place where the policy evicts, or the tokens would depend on how the drafts fell.
        length = len(self._tokens)
        depth = min(limit.depth, self._end - length - 1, self._boundary() - length)
        tree = DraftTree.empty()
        if depth > 0:
            # How much of the prompt was read before the first step must not decide how the step goes.
            features = self._features[: self._read] if self._features is not None and self.result.steps else None
            context = Context(self._tokens, self._target.vocab_size, self._sampling, self._rng, features)
            tree = self._drafter.propose(context, Limit(depth, limit.nodes))
        if tree.depth > depth:
            tree = tree.clip(depth)
        self._proposed_at = time.perf_counter()
        return tree

    def commit(
        self,
        tree: DraftTree,
        logits: Float[Tensor, "nodes V"],
        forward_started: float,
        known: Int[Tensor, " nodes"] | None = None,
    ) -> list[int]:
        """Accept what the target's forward over the pending tokens and the tree confirms, and end the step.

        Args:
            tree: that was proposed.
            logits: at its root and nodes.
            forward_started: on the clock.
            known: the token after the root and after each node, where not the target decides about it.

        Returns:
            The nodes at which the tokens that were committed were decided.
        """
        result, slots, stem = self.result, self.slots, len(self._tokens) - self._read
        held = slots.bytes_held
        attended = held // slots.length * self._target.span(slots)
        root = slots.length - len(tree) - 1
        if known is None:
            known = most_probable(logits) if self._sampling.greedy else self._sampling.probs(logits)
        verdict = accept(tree, known, self._rng)
        verified_at = time.perf_counter()

        self._keep([*range(stem), *(stem - 1 + node for node in verdict.path)])
        slots.keep([root + node for node in verdict.path], after=root + 1)
        new = len(result.tokens)
        result.tokens += verdict.tokens
        stop = self._stops.find(self._tokens, verdict.tokens)
        if stop is not None:
            del result.tokens[new + stop + 1 :]
            result.finish_reason = "stop"
        emitted = result.tokens[new:]
        decided_at = [0, *verdict.path[: len(emitted) - 1]]
        if result.logprobs is not None:
            laws = logits[decided_at].double().log_softmax(-1)
            result.logprobs += laws.gather(1, torch.tensor(emitted, device=laws.device)[:, None])[:, 0].tolist()
        self._tokens += emitted
        self.finished = stop is not None or len(self._tokens) == self._end
        self._read = len(self._tokens) - 1
        compressions = 0 if self.finished else int(self._evict())

        now = time.perf_counter()
        step = Step(
            drafted=len(tree),
            depth=tree.depth,
            rows=stem + len(tree),
            accepted=min(len(verdict.path), len(emitted)),
            emitted=len(emitted),
            draft_forwards=self._drafter.forwards - self._forwards_before,
            draft_s=self._proposed_at - self._step_started,
            verify_s=verified_at - forward_started,
            total_s=now - self._step_started,
            cache_bytes=slots.bytes_held,
            peak_cache_bytes=held,
            attended_bytes=attended,
            compressions=compressions,
        )
        result.steps.append(step)
        self._controller.observe(step)
        result.capture_s = CudaGraphs.seconds - self._captured_s
        if len(result.steps) == 1:
            result.prefill_s = now - self._started - result.capture_s
        if self._on_step is not None:
            self._on_step(emitted)
        result.decode_s = time.perf_counter() - self._started - result.prefill_s - result.capture_s
        return decided_at

    def _keep(self, rows: Sequence[int]) -> None:
        """Keep what the last forward told of the tokens that are committed, behind those that were read before: their
        attention for the policy, and their features for the drafter."""
        if self._policy.reads_attention:
            self.slots.attend(rows)
        if not self.layers:
            return
        new = self.slots.features(self.layers)[list(rows)]
        held, end = new[:0] if self._features is None else self._features, self._read + len(new)
        if end > len(held):
            wider = new.new_empty(max(end, 2 * len(held)), new.shape[1])
            wider[: self._read] = held[: self._read]
            self._features = held = wider
        held[self._read : end] = new

    def _evict(self) -> bool:
        """Let the policy evict if it is its turn, behind what has been read; whether it was."""
        evicts = self._target.evict(self.slots, self._policy)
        if evicts:
            self.evicted = self._read
        return evicts

    def _boundary(self) -> int:
        """The committed length, beyond the present one, at which the policy evicts next."""
        return boundary(self._policy, self.slots.committed + 1, self.slots.length + 1)


def stops_of(target: LM, token_ids: Sequence[int], strings: str | Sequence[str]) -> Stops:
    spell = target.spelling if strings and target.tokenizer is not None else None
    return Stops(token_ids, (strings,) if isinstance(strings, str) else strings, spell)


def check_request(
    target: LM, prompt: Sequence[int], max_new_tokens: int, policy: CachePolicy, controller: Controller
) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: decoding starts from at least one token")
    check_tokens(target, prompt, "prompt")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 must be asked for")
    if policy.interval:
        _check_policy(target, policy, controller)
        return
    if len(prompt) >= target.context_length:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the context of {target.name} holds {target.context_length}:"
            " shorten it"
        )
    if len(prompt) + max_new_tokens > target.context_length:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the context of {target.name},"
            f" {target.context_length} tokens: ask for at most {target.context_length - len(prompt)}"
        )


def check_tokens(target: LM, tokens: Sequence[int], what: str) -> None:
    outside = next((token for token in tokens if not 0 <= token < target.vocab_size), None)
    if outside is not None:
        raise ValueError(f"token {outside} of the {what} is outside the vocabulary (0 to {target.vocab_size - 1})")


def _check_policy(target: LM, policy: CachePolicy, controller: Controller) -> None:
    """A bounded cache has its own positions, so the model's context need only hold the cache."""
    most = policy.keeps + policy.interval
    if most > target.context_length:
        raise ValueError(
            f"the cache of {most} tokens exceeds the context of {target.name}, {target.context_length} tokens: take a"
            " smaller max_len"
        )
    depth = controller.limit().depth
    if most < policy.pinned + depth:
        raise ValueError(
            f"the cache of {most} tokens is too small for {policy.pinned} that always stay and a draft of {depth}: take"
            " a larger max_len or a smaller K"
        )
    _ = target.mover  # says so if this architecture's keys cannot be moved
