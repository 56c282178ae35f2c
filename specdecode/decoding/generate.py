"""generate() and generate_batch(): the one decoding loop. Every method is a combination of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.backends.graph import clock
from specdecode.controllers.base import Controller, FixedK
from specdecode.core.result import Generation
from specdecode.core.sampling import Sampling
from specdecode.core.slots import SlotBatch
from specdecode.decoding.request import Request, stops_of
from specdecode.decoding.sequence import SequenceState
from specdecode.decoding.values import TokenIds, check_makers, check_parts, check_room
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.arguments import check_lm
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll
from specdecode.support.call_stack import with_stack_room


@with_stack_room
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
    stop_token_ids: TokenIds = (),
    stop: str | Sequence[str] = (),
    logprobs: bool = False,
    on_step: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continue a prompt by speculative decoding.

    Greedy decoding gives the same tokens as plain decoding of the target. Sampling gives tokens with the same
    distribution.

    Args:
        target: the model that decides.
        prompt: token ids, at least one.
        drafter: proposes tokens; `NoDraft()` gives autoregressive decoding.
        controller: sets the limit of each draft.
        policy: chooses the tokens that stay in the target's cache. `KeepAll()` evicts nothing and is lossless.
        sampling: the rule that chooses tokens; greedy by default.
        max_new_tokens: largest number of new tokens.
        stop_token_ids: one or several tokens that end the text. Such a token is the last of the result.
        stop: strings that end the text. The result ends with the token that completes the string, which may add further
            characters after the string.
        logprobs: whether to return the log-probabilities of the new tokens.
        on_step: called after each step with the tokens that the step committed.

    Returns:
        The new tokens, with the counters and times of the steps.

    Raises:
        ValueError: an argument has another kind. The prompt is empty, or a token is outside the vocabulary.
            `max_new_tokens` is below 1. The model's context cannot hold the prompt and the new tokens, or the cache of
            the policy. The policy evicts after each token, so nothing can be drafted. There are stop strings, but the
            target has no tokenizer.
        UnsupportedModelError: the policy evicts, but the target's keys cannot be re-rotated.
        SpecDecodeError: the target's logits are not finite where it must choose a token.
    """
    check_lm("target", target)
    check_parts(drafter=drafter, controller=controller, policy=policy, sampling=sampling)
    stops = stops_of(target, stop_token_ids, stop)
    with target.recording_for(policy):
        return _decode_alone(
            Request(target, prompt, drafter, controller, policy, sampling, max_new_tokens, stops, logprobs, on_step)
        )


def plain_steps(target: LM, prompt: Sequence[int], *, max_new_tokens: int) -> Generator[int, None, None]:
    """Continue a prompt by plain greedy decoding, as `generate` does. After each step yield the number of new tokens.

    Other runs may come between two steps if they record nothing on the target (`LM.recording_for`).
    """
    sequence = SequenceState(Request(target, prompt, max_new_tokens=max_new_tokens))
    for _ in _steps(target, sequence):
        yield len(sequence.result.tokens)


def _decode_alone(request: Request) -> Generation:
    """Decode a request by forwards of its own."""
    check_room(request.policy, drafts=not isinstance(request.drafter, NoDraft))
    sequence = SequenceState(request)
    with request.target.recording_outputs(sequence.layers):
        for _ in _steps(request.target, sequence):
            pass
    return sequence.result


def _steps(target: LM, sequence: SequenceState) -> Iterator[None]:
    """Decode a sequence to its end, and yield after each step."""
    # The forward of the first step reads the rest of the prompt, so that a short prompt needs no extra forward.
    sequence.prefill(leave=sequence.chunk)
    while not sequence.finished:
        tree = sequence.propose()
        forward_started = clock()
        output = target.forward_tree(sequence.slots, sequence.pending, tree, choose=sequence.needs_only_choices)
        sequence.commit(tree, output, forward_started)
        yield


@with_stack_room
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
    stop_token_ids: TokenIds = (),
    stop: str | Sequence[str] = (),
    logprobs: bool = False,
    on_step: Callable[[int, list[int]], None] | None = None,
    on_finish: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Continue several prompts with shared target forwards. Each prompt gets the tokens that `generate` gives it alone.

    A finished prompt leaves the batch, and the next prompt joins. Proposals and acceptance of each prompt are separate,
    so the prompts advance at different speeds.

    Args:
        target: the model that decides.
        prompts: token ids of each prompt.
        batch_size: largest number of prompts that are decoded at once, at least 1. With 1, each is decoded as by
            `generate`.
        drafter: returns a new drafter for one prompt, since drafters have state.
        controller: returns a new controller for one prompt.
        policy: chooses the tokens that stay in the target's cache, for each prompt.
        sampling: the rule that chooses tokens. With a seed, prompt i is sampled as in `generate` with the seed
            `seed + i`.
        max_new_tokens: largest number of new tokens of each prompt.
        stop_token_ids: as in `generate`.
        stop: as in `generate`.
        logprobs: as in `generate`.
        on_step: called after each step of a prompt with the prompt's index and the tokens that the step committed.
        on_finish: called with a prompt's index and its result, as soon as the prompt is finished.

    Returns:
        One result for each prompt, in the order of the prompts. A shared forward counts in each of its prompts. A
            prompt's times include waiting for the other prompts of its batch, but not the time before it joins.

    Raises:
        ValueError: `batch_size` is below 1, or `generate` would refuse an argument or a prompt, whose index is in the
            message. No prompt is decoded then.
        UnsupportedModelError: as `generate`.
        SpecDecodeError: as `generate`.
    """
    check_lm("target", target)
    check_makers(drafter, controller)
    check_parts(policy=policy, sampling=sampling)
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
    """Decode checked requests that share one policy, at most `batch_size` at once; see `generate_batch`."""
    if min(batch_size, len(requests)) == 1:
        return _decode_in_turn(target, requests, drafter, on_finish)
    results: list[Generation] = []
    live: dict[int, SequenceState] = {}
    batch: SlotBatch | None = None
    with target.recording_for(requests[0].policy if requests else KeepAll()):
        while live or len(results) < len(requests):
            while len(live) < batch_size and len(results) < len(requests):
                # A drafter may have a cache, so it is created only when its request joins. The request's times start
                # here.
                place = len(results)
                live[place] = _joined(target, replace(requests[place], drafter=drafter()))
                results.append(live[place].result)
            sequences = list(live.values())
            batch = _batch_of(sequences, batch)
            _step(target, batch, sequences)
            for place in [place for place, sequence in live.items() if sequence.finished]:
                del live[place]
                if on_finish is not None:
                    on_finish(place, results[place])
    return results


def _decode_in_turn(
    target: LM,
    requests: Sequence[Request],
    drafter: Callable[[], Drafter],
    on_finish: Callable[[int, Generation], None] | None,
) -> list[Generation]:
    """Decode requests one after the other as `generate` does, so that the target's backend runs their forwards."""
    results: list[Generation] = []
    with target.recording_for(requests[0].policy):
        for place, request in enumerate(requests):
            # A drafter may have a cache, so it is created only now, after that of the last request is gone.
            results.append(_decode_alone(replace(request, drafter=drafter())))
            if on_finish is not None:
                on_finish(place, results[place])
    return results


def _joined(target: LM, request: Request) -> SequenceState:
    """Return a request's sequence, ready to join a batch."""
    check_room(request.policy, drafts=not isinstance(request.drafter, NoDraft))
    sequence = SequenceState(request, in_batch=True)
    with target.recording_outputs(sequence.layers):
        # Read all tokens but one: a longer remainder would be padding in the rows of the other prompts.
        sequence.prefill(leave=1)
    return sequence


def _batch_of(sequences: Sequence[SequenceState], last: SlotBatch | None) -> SlotBatch:
    """Return the batch of these sequences, which is the last batch if its sequences are the same."""
    slots = [sequence.slots for sequence in sequences]
    return last if last is not None and last.rows == slots else SlotBatch(slots)


def _step(target: LM, batch: SlotBatch, sequences: Sequence[SequenceState]) -> None:
    """Make one step of every sequence of a batch."""
    trees = [sequence.propose() for sequence in sequences]
    forward_started = clock()
    with target.recording_outputs(sorted({layer for sequence in sequences for layer in sequence.layers})):
        logits = target.forward_trees(batch, [sequence.pending for sequence in sequences], trees)
        for sequence, tree, sequence_logits in zip(sequences, trees, logits, strict=True):
            sequence.commit(tree, sequence_logits, forward_started)
