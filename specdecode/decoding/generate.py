"""generate() and generate_batch(): the one decoding loop. Every method is a combination of its arguments."""

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
from specdecode.decoding.request import Request, stops_of
from specdecode.decoding.sequence import SequenceState
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
    """Continue a prompt with the tokens of plain decoding of the target, or, when sampling, with their distribution.

    Args:
        target: decides.
        prompt: token ids, at least one.
        drafter: proposes; `NoDraft()` is autoregressive decoding.
        controller: limits the drafts.
        policy: evicts from the target's cache.
        sampling: chooses tokens; greedy by default.
        max_new_tokens: the length limit.
        stop_token_ids: any of these tokens ends the text, and is its last token.
        stop: any of these strings ends the text. The last token is the one that completes the string; it may bring
            further characters after it.
        logprobs: whether to return the log-probabilities of the new tokens.
        on_step: called after each step with the tokens that it committed.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or no tokens asked for. More tokens than the
            model's context holds. Stop strings for a target without a tokenizer.
    """
    stops = stops_of(target, stop_token_ids, stop)
    with target.recording_for(policy, drafter.layers):
        sequence = SequenceState(
            Request(target, prompt, drafter, controller, policy, sampling, max_new_tokens, stops, logprobs, on_step)
        )
        # The first step's forward reads the rest of the prompt, so that a short prompt costs no forward of its own.
        sequence.prefill(but=PREFILL_CHUNK)
        while not sequence.finished:
            tree = sequence.propose()
            forward_started = time.perf_counter()
            logits = target.forward_tree(sequence.slots, sequence.pending, tree)
            sequence.commit(tree, logits, forward_started)
        return sequence.result


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
    """Continue several prompts with shared target forwards; each gets the tokens that `generate` gives it alone.

    A finished prompt leaves the batch, and the next one takes its place. Each prompt has its own proposals and its own
    acceptance, so each keeps its own pace.

    Args:
        target: decides.
        prompts: token ids of each.
        batch_size: the most prompts that are decoded at once.
        drafter: makes the drafter of one prompt, since drafters have state.
        controller: makes the controller of one prompt.
        policy: evicts from the target's cache, for each prompt.
        sampling: chooses tokens. With a seed, prompt i is sampled as by `generate` with the seed `seed + i`.
        max_new_tokens: the length limit of each.
        stop_token_ids: as in `generate`.
        stop: as in `generate`.
        logprobs: as in `generate`.
        on_step: called with a prompt's index and the tokens that a step of it committed.
        on_finish: called with a prompt's index and its result, as soon as it is finished.

    Returns:
        A result for each prompt, in their order. A shared forward counts in each of its prompts. A prompt's times
        include waiting for the others of its batch, but not the time before it joins.

    Raises:
        ValueError: a batch below 1, or anything that `generate` refuses, with the prompt's index, before anything is
            decoded.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least 1 prompt must be decoded at once")
    stops = stops_of(target, stop_token_ids, stop)
    requests: list[Request] = []
    for place, prompt in enumerate(prompts):
        seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + place)
        try:
            requests.append(
                Request(
                    target,
                    prompt,
                    controller=controller(),
                    policy=policy,
                    sampling=seeded,
                    max_new_tokens=max_new_tokens,
                    stops=stops,
                    logprobs=logprobs,
                    on_step=None if on_step is None else partial(on_step, place),
                )
            )
        except ValueError as error:
            raise ValueError(f"prompt {place} of {len(prompts)}: {error}") from None
    return _decode_batches(target, requests, batch_size, drafter, on_finish)


def _decode_batches(
    target: LM,
    requests: Sequence[Request],
    batch_size: int,
    drafter: Callable[[], Drafter],
    on_finish: Callable[[int, Generation], None] | None,
) -> list[Generation]:
    """Decode checked requests of one policy, at most `batch_size` at once; see `generate_batch`."""
    results: list[Generation] = []
    live: dict[int, SequenceState] = {}
    batch: SlotBatch | None = None
    with target.recording_for(requests[0].policy if requests else KeepAll()):
        while live or len(results) < len(requests):
            while len(live) < batch_size and len(results) < len(requests):
                # A drafter may have a cache, so none is made before it is needed. The request's times start here.
                joining = SequenceState(replace(requests[len(results)], drafter=drafter()))
                with target.recording_outputs(joining.layers):
                    # What is left of one prompt would be padding for the others.
                    joining.prefill(but=1)
                live[len(results)] = joining
                results.append(joining.result)
            sequences = list(live.values())
            batch = _batch_of(sequences, batch)
            _step(target, batch, sequences)
            for place in [place for place, sequence in live.items() if sequence.finished]:
                del live[place]
                if on_finish is not None:
                    on_finish(place, results[place])
    return results


def _batch_of(sequences: Sequence[SequenceState], last: SlotBatch | None) -> SlotBatch:
    """Return the batch of these sequences: the last one if its sequences are the same."""
    slots = [sequence.slots for sequence in sequences]
    return last if last is not None and last.rows == slots else SlotBatch(slots)


def _step(target: LM, batch: SlotBatch, sequences: Sequence[SequenceState]) -> None:
    """Decode one step of every sequence of a batch."""
    trees = [sequence.propose() for sequence in sequences]
    forward_started = time.perf_counter()
    with target.recording_outputs(sorted({layer for sequence in sequences for layer in sequence.layers})):
        logits = target.forward_trees(batch, [sequence.pending for sequence in sequences], trees)
    for sequence, tree, sequence_logits in zip(sequences, trees, logits, strict=True):
        sequence.commit(tree, sequence_logits, forward_started)
