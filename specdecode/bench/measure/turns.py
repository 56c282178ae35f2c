"""Runs of arms in turns with plain decoding: a few steps of the arm, then as many tokens of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from specdecode.backends.device import synchronise
from specdecode.backends.graph import clock
from specdecode.backends.grouped_attention import own_config
from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.run import Run
from specdecode.bench.arms.slices import sliced
from specdecode.bench.measure.interleaved import SLICE_S, SteadySlices, summed
from specdecode.bench.measure.steady import Steady
from specdecode.bench.measure.timed import timed_by
from specdecode.decoding.generate import plain_steps
from specdecode.models.lm import LM
from specdecode.models.variants import shared_copy
from specdecode.support.call_stack import with_stack_room


@dataclass(frozen=True, slots=True)
class Turn:
    """A run of an arm, and plain decoding in turns with it.

    Attributes:
        run: the run. Its `beside_s` is the time per token of plain decoding, as compared over the slices.
        plain_s: seconds of plain decoding, over all slices.
    """

    run: Run
    plain_s: float


def reason_against(arms: Sequence[Arm], baseline: str) -> str | None:
    """Return why runs of the arms cannot take turns with the reference arm; None if they can."""
    for arm in arms:
        if arm.server is not None:
            return f"{arm.name} is a server"
        if arm.options.get("batch", 1) > 1:
            return f"{arm.name} decodes a batch"
        if arm.baseline not in (None, baseline):
            return f"{arm.name} has a reference arm of its own"
    reference = next(arm for arm in arms if arm.name == baseline)
    plain = reference.options.get("drafter", "none") == "none"
    if reference.foreign or reference.peer or reference.lossy or not plain:
        return f"{baseline} is not this package's plain decoding"
    return None


class Turns:
    """A measurer of runs in turns with plain decoding.

    Plain decoding runs on a copy of the reference arm's target, which shares all weights: an arm may record attention
    or hidden states on the target while it decodes.

    Args:
        reference: the reference arm. `reason_against` must give no reason.
        steady: the rule for disturbed runs, and the watch over other work.
    """

    def __init__(self, reference: Arm, steady: Steady) -> None:
        assert reference.target is not None
        self._target = _twin(reference.target)
        self._slices = SteadySlices(steady)
        self._steps: dict[str, int] = {}  # steps of a slice, by arm

    def measure(self, arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Turn:
        """Return the least disturbed of several runs of an arm. The arguments are those of `Arm.run`.

        Raises:
            ArmError: an arm from code does not decode.
        """
        kept = self._slices.measure(lambda: timed_by(lambda: self._once(arm, prompt, length, expected)))
        turn, captured = kept.value
        run = replace(turn.run, tries=kept.tries, disturbed=kept.disturbed, captured=captured)
        return replace(turn, run=run)

    @with_stack_room
    def _once(self, arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Turn:
        with closing(_Plain(self._target, prompt, length)) as plain:
            return self._beside(plain, arm, prompt, length, expected)

    def _beside(self, plain: _Plain, arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Turn:
        """Run an arm in turns with plain decoding."""
        plain_s: list[float] = []
        taken: list[float] = []
        share = self._slices.steady.begin_watch()

        def decode_plainly(tokens: int) -> None:
            nonlocal share
            plain_s.append(plain.until(tokens))
            taken.append(share() or 0.0)
            share = self._slices.steady.begin_watch()

        with sliced(self._steps.get(arm.name, 1), lambda: decode_plainly(slices.tokens)) as slices:
            run = arm.run(prompt, length, expected)
        decode_plainly(len(run.tokens))
        own_s = slices.seconds
        self._steps[arm.name] = max(1, round(SLICE_S * run.counts.steps / run.total_s))
        if 2 * own_s[0] > sum(own_s):
            # A long prompt, or code that yields everything at the end: slices cannot be compared one by one.
            self._slices.compare_all(taken)
            kept = list(range(len(own_s)))
        else:
            kept = self._slices.compared(taken)
            run = replace(run, slices=len(own_s), left_out=len(own_s) - len(kept))
        beside_s = run.s_per_token * summed(plain_s, kept) / summed(own_s, kept)
        return Turn(replace(run, beside_s=beside_s), sum(plain_s))


class _Plain:
    """Plain decoding of one prompt, which continues on request.

    No token stops it: it writes as many as the arm beside it, whose output may end later than plain decoding's.
    """

    def __init__(self, target: LM, prompt: Sequence[int], length: int) -> None:
        self._device = target.device
        self._steps = plain_steps(target, prompt, max_new_tokens=length)
        self._tokens = 0

    def close(self) -> None:
        """Give back the slots, so that the next run finds the shapes that were captured for them. No garbage is
        collected during runs."""
        self._steps.close()

    @torch.inference_mode()
    def until(self, tokens: int) -> float:
        """Decode up to `tokens` tokens, or to the end of the text. Return the seconds, without captures."""
        synchronise(self._device)
        started = clock()
        while self._tokens < tokens and (count := next(self._steps, None)) is not None:
            self._tokens = count
        synchronise(self._device)
        return clock() - started


def _twin(target: LM) -> LM:
    """Return an LM of the same weights and backend, with a state of its own."""
    model = shared_copy(target.model)
    own_config(model)  # recording attention changes the configuration
    return LM(model, target.tokenizer, name=target.name, synthetic=target.synthetic, backend=target.backend)
