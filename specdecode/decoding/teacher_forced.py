"""Teacher forcing: decoding of a known text through the loop of `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.backends.graph import clock
from specdecode.controllers.base import Controller, FixedK
from specdecode.core.transfer import picked
from specdecode.decoding.request import Request, check_tokens
from specdecode.decoding.sequence import SequenceState
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


@dataclass(frozen=True, slots=True)
class ForcedStep:
    """The logits of one step over a known text.

    Attributes:
        place: index in the text of the first token that the step committed.
        logits: [n, V] the target's logits for the n committed tokens: row i predicts token i.
        evicted_at: number of tokens that the target had read at the last eviction; None before the first eviction.
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
    """Decode a known text step by step, and commit the tokens of the text in place of the target's choices.

    Proposals are accepted as far as they agree with the text. So the text passes through the steps, slots and evictions
    of `generate`. Several texts may be decoded in turns with the same target.

    Args:
        target: the model that reads the text.
        text: token ids.
        start: number of tokens of the prompt, the part of the text that gets no logits.
        drafter: proposes tokens.
        controller: sets the limit of each draft.
        policy: chooses the tokens that stay in the target's cache.

    Yields:
        The steps in order. Together they cover the text from `start` on.

    Raises:
        ValueError: `start` leaves no prompt or no tokens after it, or `Request` refuses the prompt or the number of new
            tokens.
        UnsupportedModelError: as `Request`.
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
        sequence.prefill(leave=sequence.chunk)
    while not sequence.finished:
        place, evicted_at = start + len(sequence.result.tokens), sequence.evicted_at
        tree = sequence.propose()
        forward_started = clock()
        with target.recording_for(policy, drafter.layers):
            logits = target.forward_tree(sequence.slots, sequence.pending, tree)
        ahead = torch.tensor(tokens[place : place + tree.depth + 1])
        nodes = sequence.commit(tree, logits, forward_started, forced=ahead[tree.depths])
        yield ForcedStep(place, picked(logits, nodes), evicted_at)
