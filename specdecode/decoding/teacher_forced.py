"""Decode a known text through the loop (teacher forcing)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.controllers.base import Controller, FixedK
from specdecode.core.sampling import Sampling
from specdecode.core.stopping import Stops
from specdecode.decoding.sequence import SequenceState, check_tokens
from specdecode.drafters.base import Drafter
from specdecode.drafters.none import NoDraft
from specdecode.models.lm import LM, PREFILL_CHUNK
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll


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
    check_tokens(target, known, "text")
    stops = Stops((), (), None)
    told = SequenceState(
        target, known[:start], drafter, controller, policy, Sampling(), len(known) - start, stops, False, None
    )
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
