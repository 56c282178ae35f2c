"""generate(), generate_batch() and follow(): the one decoding loop. Every method is a combination of its arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.controllers.base import Controller, FixedK
from specdecode.core.result import Generation
from specdecode.core.sampling import Sampling
from specdecode.core.slots import SlotBatch
from specdecode.decoding.sequence import SequenceState, check_request, stops_of
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.lm import LM, PREFILL_CHUNK
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


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
    stops = stops_of(target, stop_token_ids, stop)
    with target.recording_for(policy, drafter.layers):
        text = SequenceState(
            target, prompt, drafter, controller, policy, sampling, max_new_tokens, stops, logprobs, on_step
        )
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
    stops = stops_of(target, stop_token_ids, stop)
    for place, prompt in enumerate(prompts):
        try:
            check_request(target, [int(token) for token in prompt], max_new_tokens, policy, controller())
        except ValueError as error:
            raise ValueError(f"prompt {place} of {len(prompts)}: {error}") from None

    def begin(place: int) -> SequenceState:
        own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + place)
        told = None if on_step is None else partial(on_step, place)
        text = SequenceState(
            target, prompts[place], drafter(), controller(), policy, own, max_new_tokens, stops, logprobs, told
        )
        with target.recording_outputs(text.layers):
            # What is left of one prompt would be padding for the others.
            text.prefill(but=1)
        return text

    results: list[Generation] = []
    live: dict[int, SequenceState] = {}
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
