"""Teacher forcing: decode a known text through the loop of `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.controllers.base import Controller, FixedK
from specdecode.core.transfer import picked
from specdecode.decoding.request import Request, check_tokens
from specdecode.decoding.sequence import SequenceState
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.lm import LM, PREFILL_CHUNK
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


@dataclass(frozen=True, slots=True)
class ForcedStep:
    """Hold the logits of one step over a known text.

    Attributes:
        place: index in the text of the first token that the step committed.
        logits: [n, V] at each of its n committed tokens, from which that token would have been chosen.
        evicted_at: tokens that had been read when the policy evicted last; None before it first does.
    """

    place: int
    logits: Float[Tensor, "n V"]
    evicted_at: int | None


@torch.inference_mode()
def teacher_forced(
    target: LM,
    text: Sequence[int] | Int[Tensor, " n"],
    start: int = 1,
    *,
    drafter: Drafter = NoDraft(),
    controller: Controller = FixedK(5),
    policy: CachePolicy = KeepAll(),
) -> Iterator[ForcedStep]:
    """Decode a known text step by step, committing its own tokens in place of the target's choices.

    Proposals are accepted as far as the text agrees. So the text is judged through the steps, slots and evictions of
    `generate`. Texts may be decoded alternately, step by step, with the same target too.

    Args:
        target: reads.
        text: token ids.
        start: length of the prompt, the part of the text that is read but not judged.
        drafter: proposes.
        controller: limits the drafts.
        policy: evicts from the target's cache.

    Yields:
        One step after another; together they cover the text from `start` on.

    Raises:
        ValueError: `start` leaves no prompt or no tokens to judge, or `Request` refuses such a prompt and as many new
            tokens.
    """
    tokens = [int(token) for token in text]
    if not 1 <= start < len(tokens):
        raise ValueError(
            f"the text has {len(tokens)} tokens, of which {start} are the prompt: leave at least 1 for each"
        )
    check_tokens(target, tokens, "text")
    request = Request(target, tokens[:start], drafter, controller, policy, max_new_tokens=len(tokens) - start)
    sequence = SequenceState(request)
    with target.recording_for(policy, drafter.layers):
        sequence.prefill(but=PREFILL_CHUNK)
    while not sequence.finished:
        place, evicted_at = start + len(sequence.result.tokens), sequence.evicted_at
        tree = sequence.propose()
        forward_started = time.perf_counter()
        with target.recording_for(policy, drafter.layers):
            logits = target.forward_tree(sequence.slots, sequence.pending, tree)
        ahead = torch.tensor(tokens[place : place + tree.depth + 1])
        nodes = sequence.commit(tree, logits, forward_started, forced=ahead[tree.depths])
        yield ForcedStep(place, picked(logits, nodes), evicted_at)
