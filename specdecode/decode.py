"""generate(), generate_batch() and follow(): the one decoding loop. Every method is a combination of its arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.backends.graph import CudaGraphs
from specdecode.controllers.base import MAX_DRAFT_NODES, Controller, FixedK, Limit
from specdecode.core.result import Generation, Step
from specdecode.core.sampling import Sampling
from specdecode.core.slots import SlotBatch
from specdecode.core.stopping import Stops
from specdecode.core.tree import DraftTree
from specdecode.core.verify import accept
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.lm import LM, PREFILL_CHUNK
from specdecode.policies.base import CachePolicy, boundary
from specdecode.policies.keep_all import KeepAll

# Slots taken at the start for tokens to come; more are taken by doubling.
_AHEAD = 2048


@torch.inference_mode()
def generate(
    target: LM,
    prompt: Sequence[int] | Int[Tensor, " n"],
    *,
    drafter: Drafter = NoDraft(),
    controller: Controller = FixedK(5),
    policy: CachePolicy = KeepAll(),
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 128,
    stop_token_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    logprobs: bool = False,
    on_step: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continue a prompt, with the tokens (or, when sampling, the law of tokens) of plain decoding of the target.

    Args:
        target: decides.
        prompt: token ids, at least one.
        drafter: proposes; `NoDraft()` is autoregressive decoding.
        controller: how long to draft.
        policy: what stays in the target's cache.
        sampling: how tokens are chosen; greedy by default.
        max_new_tokens: the length limit.
        stop_token_ids: any of these ends the text, and is its last token.
        stop: any of these strings ends the text, whose last token is the one that completes it (and may bring more
            text behind it).
        logprobs: whether the log-probabilities of the new tokens are wanted.
        on_step: called after each step with the tokens that it committed, as soon as they are known.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, no tokens asked for, more than the model's
            context holds, or stop strings for a target without a tokenizer.
    """
    stops = _stops(target, stop_token_ids, stop)
    with target.recording_for(policy, drafter.layers):
        text = _Text(target, prompt, drafter, controller, policy, sampling, max_new_tokens, stops, logprobs, on_step)
        # The first step's forward carries what is left of the prompt, so that a short one costs no forward of its own.
        text.prefill(but=PREFILL_CHUNK)
        while not text.finished:
            tree = text.propose()
            started = time.perf_counter()
            logits = target.forward_tree(text.slots, text.pending, tree)
            text.commit(tree, logits, started)
        return text.result


@torch.inference_mode()
def generate_batch(
    target: LM,
    prompts: Sequence[Sequence[int] | Int[Tensor, " _"]],
    *,
    batch_size: int = 8,
    drafter: Callable[[], Drafter] = NoDraft,
    controller: Callable[[], Controller] = partial(FixedK, 5),
    policy: CachePolicy = KeepAll(),
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 128,
    stop_token_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    logprobs: bool = False,
    on_step: Callable[[int, list[int]], None] | None = None,
    on_finish: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Continue several prompts that share the target's forwards, each with the tokens that `generate` gives it alone.

    A prompt that is finished leaves the batch, and the next one takes its place. Proposals are made and judged for each
    by itself, so that each keeps its own pace.

    Args:
        target: decides.
        prompts: token ids of each.
        batch_size: the most that are decoded at once.
        drafter: makes the drafter of one prompt, which has state of its own.
        controller: makes the controller of one prompt.
        policy: what stays in the target's cache, for each prompt.
        sampling: how tokens are chosen. With a seed, prompt i is sampled as by `generate` with the seed `seed + i`.
        max_new_tokens: the length limit of each.
        stop_token_ids: as in `generate`.
        stop: as in `generate`.
        logprobs: as in `generate`.
        on_step: called with a prompt's place and the tokens that a step of it committed.
        on_finish: called with a prompt's place and its result, as soon as it is finished.

    Returns:
        One for each prompt, in their order. A forward is shared by the batch, and counted in each of its prompts;
        times of a prompt include those in which it waits for the others of its batch, but not those before it joins.

    Raises:
        ValueError: a batch below 1, and all that `generate` refuses, with the prompt's place, before anything is
            decoded.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least 1 prompt must be decoded at once")
    stops = _stops(target, stop_token_ids, stop)
    for place, prompt in enumerate(prompts):
        try:
            _check(target, [int(token) for token in prompt], max_new_tokens, policy, controller())
        except ValueError as error:
            raise ValueError(f"prompt {place} of {len(prompts)}: {error}") from None

    def begin(place: int) -> _Text:
        own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + place)
        told = None if on_step is None else partial(on_step, place)
        text = _Text(
            target, prompts[place], drafter(), controller(), policy, own, max_new_tokens, stops, logprobs, told
        )
        with target.recording_outputs(text.layers):
            # What is left of one prompt would be padding for the others.
            text.prefill(but=1)
        return text

    results: list[Generation] = []
    live: dict[int, _Text] = {}
    batch: SlotBatch | None = None
    with target.recording_for(policy):
        while live or len(results) < len(prompts):
            while len(live) < batch_size and len(results) < len(prompts):
                live[len(results)] = text = begin(len(results))
                results.append(text.result)
            texts = list(live.values())
            slots = [text.slots for text in texts]
            if batch is None or batch.rows != slots:
                batch = SlotBatch(slots)
            trees = [text.propose() for text in texts]
            started = time.perf_counter()
            with target.recording_outputs(sorted({layer for text in texts for layer in text.layers})):
                logits = target.forward_trees(batch, [text.pending for text in texts], trees)
            for text, tree, own in zip(texts, trees, logits, strict=True):
                text.commit(tree, own, started)
            for place in [place for place, text in live.items() if text.finished]:
                del live[place]
                if on_finish is not None:
                    on_finish(place, results[place])
    return results


@dataclass(frozen=True, slots=True)
class Followed:
    """What one step said of the tokens of a known text that it committed.

    Attributes:
        place: in the text, of the first of them.
        logits: [n, V] from which each of them would have been chosen.
        evicted: length of the text that had been read when the policy evicted last; None before it first does.
    """

    place: int
    logits: Float[Tensor, "n V"]
    evicted: int | None


@torch.inference_mode()
def follow(
    target: LM,
    text: Sequence[int] | Int[Tensor, " n"],
    start: int = 1,
    *,
    drafter: Drafter = NoDraft(),
    controller: Controller = FixedK(5),
    policy: CachePolicy = KeepAll(),
) -> Iterator[Followed]:
    """Decode a text that is known (teacher forcing): what `generate` does, step by step, but that the text's own tokens
    are committed in place of those that the target would choose. Proposals are accepted as far as the text agrees.

    So the text is judged through the very steps, slots and evictions of decoding. Other texts may be followed between
    two steps, of the same target too.

    Args:
        target: reads.
        text: token ids.
        start: so many of them are the prompt, which is read as `generate` reads it, and not judged.
        drafter: proposes.
        controller: how long to draft.
        policy: what stays in the target's cache.

    Yields:
        One for each step; together they cover the text from `start` on.

    Raises:
        ValueError: all that `generate` refuses of such a prompt and as many new tokens.
    """
    known = [int(token) for token in text]
    if not 1 <= start < len(known):
        raise ValueError(
            f"the text has {len(known)} tokens, of which {start} are the prompt: leave at least 1 for each"
        )
    _check_tokens(target, known, "text")
    stops = Stops((), (), None)
    told = _Text(target, known[:start], drafter, controller, policy, Sampling(), len(known) - start, stops, False, None)
    with target.recording_for(policy, drafter.layers):
        told.prefill(but=PREFILL_CHUNK)
    while not told.finished:
        place, evicted = start + len(told.result.tokens), told.evicted
        tree = told.propose()
        started = time.perf_counter()
        with target.recording_for(policy, drafter.layers):
            logits = target.forward_tree(told.slots, told.pending, tree)
        ahead = torch.tensor(known[place : place + tree.depth + 1], device=tree.parents.device)
        rows = told.commit(tree, logits, started, ahead[tree.depths])
        yield Followed(place, logits[rows], evicted)


class _Text:
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
        _check(target, self._tokens, max_new_tokens, policy, controller)
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
            known = logits.argmax(-1) if self._sampling.greedy else self._sampling.probs(logits)
        verdict = accept(tree, known, self._rng)
        verified_at = time.perf_counter()

        self._keep([*range(stem), *(stem - 1 + node for node in verdict.path)])
        slots.keep([root + node for node in verdict.path], after=root + 1)
        new = len(result.tokens)
        result.tokens += verdict.tokens
        stop = self._stops.find(result.tokens, new)
        if stop is not None:
            del result.tokens[stop + 1 :]
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


def _stops(target: LM, token_ids: Sequence[int], strings: str | Sequence[str]) -> Stops:
    return Stops(token_ids, (strings,) if isinstance(strings, str) else strings, target.tokenizer and target.decode)


def _check(target: LM, prompt: Sequence[int], max_new_tokens: int, policy: CachePolicy, controller: Controller) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: decoding starts from at least one token")
    _check_tokens(target, prompt, "prompt")
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


def _check_tokens(target: LM, tokens: Sequence[int], what: str) -> None:
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
