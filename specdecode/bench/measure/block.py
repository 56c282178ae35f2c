"""Measurement of one block: a prompt decoded by every arm, with reference arms first, last and in between."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar, get_args

import torch

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import NO_MEMORY, ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.check import Check, check
from specdecode.bench.measure.output_stats import own_losses, with_output_stats
from specdecode.bench.measure.steady import Steady
from specdecode.bench.measure.timed import timed
from specdecode.bench.measure.turns import Turns
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.statistics import NOISE_OF_TWO
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Block:
    """One prompt decoded by every arm. Reference arms run first and last.

    The run's own reference arm also runs between parts of the other arms. Each arm is compared with its nearest runs,
    one before and one after.

    Attributes:
        prompt: id of the prompt.
        repeat: number of the block among those of this prompt, from 0.
        runs: the run of each arm, by name; the first run of a reference arm.
        last: the last run of each reference arm, by name. In turns with plain decoding a reference arm runs once; this
            is then a copy of that run, with the seconds of plain decoding as its `total_s`.
        middle: the middle run of the reference arm of arms that name no other; None if it has only two runs. In turns,
            its only run.
        checks: the check of each arm, by name: "equal" to its reference arm's output; "tie", if it first differs where
            the target's logits are equal within rounding; or "bug", if it is wrong, which voids its time.
    """

    prompt: str
    repeat: int
    runs: dict[str, Run]
    last: dict[str, Run]
    checks: dict[str, Check]
    middle: Run | None = None

    def log_speedup(self, arm: str, baseline: str) -> float:
        """Return the logarithm of an arm's speedup over `baseline`, the run's reference arm; 0 for that arm itself. For
        another reference arm, return the mean of its two runs.

        The speedup is a ratio of times per token. For equal outputs this equals the ratio of total times.
        """
        if arm == baseline:
            return 0.0
        runs = self._runs_of(arm)
        beside = [run.beside_s for run in runs if run.beside_s is not None]
        if len(beside) < len(runs):  # cut at a shorter length
            return self.log_s(baseline) - self.log_s(arm)
        return statistics.fmean(map(math.log, beside)) - self.log_s(arm)

    def log_s(self, arm: str) -> float:
        """Return the logarithm of an arm's seconds per token; the mean of two runs for a reference arm."""
        return statistics.fmean(math.log(run.s_per_token) for run in self._runs_of(arm))

    def _runs_of(self, arm: str) -> list[Run]:
        return [self.runs[arm], self.last[arm]] if arm in self.last else [self.runs[arm]]

    def change(self, baseline: str) -> float:
        """Return the logarithm of a reference arm's first time per token over its last."""
        return math.log(self.runs[baseline].s_per_token / self.last[baseline].s_per_token)

    def noise(self, baseline: str) -> float:
        """Return the log speedup of the reference arm's middle run over the runs beside it, the A/A noise of
        `log_speedup`.

        Without a middle run, return the change from the first to the last run, scaled to the same noise.
        """
        if self.middle is None or self.middle.beside_s is None:
            return NOISE_OF_TWO * self.change(baseline)
        return math.log(self.middle.beside_s / self.middle.s_per_token)

    def drift(self, baseline: str) -> tuple[float, float]:
        """Return the reference arm's differences between distant runs and between near runs: `change` and `noise`."""
        return self.change(baseline), self.noise(baseline)

    def at(self, length: int) -> Block:
        """Return the block with its runs cut at a length, without arms that have no cut there."""
        runs = {arm: cut for arm, run in self.runs.items() if (cut := run.at(length)) is not None}
        last = {arm: cut for arm, run in self.last.items() if (cut := run.at(length)) is not None and arm in runs}
        return replace(
            self,
            runs={arm: run for arm, run in runs.items() if arm in last or arm not in self.last},
            last=last,
            middle=None,
        )


def named(arms: Sequence[Arm], name: str) -> Arm:
    """Return the arm with a name."""
    return next(arm for arm in arms if arm.name == name)


def baselines_of(arms: Sequence[Arm], baseline: str) -> list[Arm]:
    """Return the reference arms among the arms, the run's own first."""
    others = {arm.baseline for arm in arms} - {None, baseline}
    return [named(arms, baseline), *(arm for arm in arms if arm.name in others)]


@contextmanager
def closing(arms: Sequence[Arm], failures: dict[str, str]) -> Iterator[None]:
    """Close the arms when the context ends, also after an exception. See `timed` for the garbage."""
    try:
        yield
    finally:
        gc.unfreeze()
        for arm in arms:
            with noted(arm, failures):
                arm.close()


@contextmanager
def noted(arm: Arm, failures: dict[str, str] | None) -> Iterator[None]:
    """Record the failure of an arm from code, or of an arm that needs too much memory, so that the other arms go on.

    Raise it if `failures` is None.
    """
    try:
        yield
    except (ArmError, torch.OutOfMemoryError) as error:
        failed = error if isinstance(error, ArmError) else ArmError(f"arm {arm.name!r}: {NO_MEMORY}")
        if failures is None:
            raise failed from None
        failures[arm.name] = str(failed)


def measure_block(
    arms: Sequence[Arm],
    prompt: str,
    text: Sequence[int],
    max_new_tokens: int,
    repeat: int = 0,
    tell: Callable[[str], None] = lambda doing: None,
    failures: dict[str, str] | None = None,
    baseline: str = BASELINE,
    steady: Steady | None = None,
    parts: int = 2,
    turns: Turns | None = None,
) -> Block:
    """Measure the arms, reference arms included, on one prompt.

    Args:
        arms: as for `experiment`.
        prompt: id of the prompt.
        text: tokens of the prompt.
        max_new_tokens: length of every output, unless a stop token of the arms ends it.
        repeat: number of the block among those of this prompt, from 0.
        tell: called with a text on each run before it starts.
        failures: error messages of failed arms from code are added here; failed arms are not in the block. If None,
            the first failure is raised.
        baseline: the reference arm of arms that name no other. Its failure is raised.
        steady: measures disturbed runs again, and remembers earlier blocks; a new one if None.
        parts: number of parts of the other arms, with runs of the reference arm between; fewer if there are fewer arms.
        turns: measures each run in turns with the reference arm, which then runs apart only once; None to compare whole
            runs.
    """
    baselines = baselines_of(arms, baseline)
    others = [arm for arm in arms if arm not in baselines]
    order = random.Random(f"{prompt} {repeat}").sample(others, len(others))
    tell(f"expected outputs on {prompt}")
    runs = _Runs(arms, baselines, text, max_new_tokens, steady or Steady(), failures, turns)

    def run(arm: Arm, into: dict[str, Run]) -> None:
        tell(f"{arm.name} on {prompt}")
        runs.run(arm, into)

    for arm in baselines:
        run(arm, runs.first)
    for place, part in enumerate(parted(order, 1 if turns else parts)):
        if place:
            runs.run(baselines[0], {})  # between two parts: arms on both sides are compared with this run
        for arm in part:
            run(arm, runs.first)
    for arm in reversed(baselines):
        if arm.name in runs.first and arm.name not in runs.last:
            run(arm, runs.last)
        if arm.name not in runs.last:
            runs.first.pop(arm.name, None)
    runs.note_what_is_beside()
    checks = runs.checks()
    target = baselines[0].target
    losses = {
        tokens: None if target is None else own_losses(target, text, tokens)
        for tokens in {tuple(runs.first[name].tokens) for name in checks}
    }
    first = {name: with_output_stats(runs.first[name], losses[tuple(runs.first[name].tokens)]) for name in checks}
    last = {name: run for name, run in runs.last.items() if name in checks}
    return Block(prompt, repeat, first, last, checks, runs.beats[0] if turns else _middle(runs.beats))


class _Runs:
    """The runs of a block.

    Args:
        arms: all arms.
        baselines: the reference arms among them, the run's own first.
        text: tokens of the prompt.
        length: length of every output.
        steady: measures disturbed runs again.
        failures: error messages of failed arms from code are added here; if None, the first failure is raised.
        turns: measures runs in turns with the reference arm; None for whole runs.

    Attributes:
        first, last: first and last runs, by arm.
        beats: all runs of the run's reference arm, in order.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        baselines: Sequence[Arm],
        text: Sequence[int],
        length: int,
        steady: Steady,
        failures: dict[str, str] | None,
        turns: Turns | None,
    ) -> None:
        self.first: dict[str, Run] = {}
        self.last: dict[str, Run] = {}
        self.beats: list[Run] = []
        self._arms, self._baseline, self._text, self._length = arms, baselines[0].name, text, length
        self._steady, self._failures, self._turns = steady, failures, turns
        # For each run of another arm: the dictionary with it, the arm, and the number of `beats` before it.
        self._places: list[tuple[dict[str, Run], str, int]] = []
        # Untimed runs, so that no timed run is the first with the prompt's shapes. Lossy arms need the whole output.
        lossy = any(arm.lossy for arm in arms)
        written = baselines[0].run(text, length if lossy else 1, ()).tokens
        self._references = self._references_of_lossy_arms(written)
        for arm in baselines[1:]:
            with noted(arm, failures):
                arm.run(text, 1, ())

    def _references_of_lossy_arms(self, written: Sequence[int]) -> dict[str, Sequence[int]]:
        """Return the tokens that each lossy arm must write. Arms with the same weights and policy share them.

        Args:
            written: tokens of the run's reference arm.
        """
        by_loss: dict[tuple[LM | None, CachePolicy], Sequence[int]] = {}
        references = {}
        for arm in self._arms:
            if arm.lossy:
                with self._noted(arm):
                    loss = arm.target, arm.policy
                    if loss not in by_loss:
                        by_loss[loss] = arm.expected(self._text, written, self._length)
                    references[arm.name] = by_loss[loss]
        return references

    def _noted(self, arm: Arm) -> AbstractContextManager[None]:
        """Record the failure of an arm. Raise that of the run's reference arm."""
        return noted(arm, None if arm.name == self._baseline else self._failures)

    def run(self, arm: Arm, into: dict[str, Run]) -> None:
        """Measure a run of an arm, and store it by the arm's name. Store nothing if it fails, or has failed."""
        is_baseline = arm.name == self._baseline
        if arm.name in (self._failures or ()):
            return
        with self._noted(arm):
            expected = self._expected(arm)
            if self._turns is not None:
                turn = self._turns.measure(arm, self._text, self._length, expected)
                into[arm.name] = turn.run
                if is_baseline:
                    self.beats.append(turn.run)
                    # Here plain decoding takes turns with itself, so its seconds are those of a second run of the arm.
                    self.last[arm.name] = replace(
                        turn.run,
                        total_s=turn.plain_s,
                        beside_s=None,
                        tries=1,
                        disturbed=False,
                        captured=False,
                        slices=0,
                        left_out=0,
                    )
                return
            run = into[arm.name] = steady_run(self._steady, lambda: timed(arm, self._text, self._length, expected))
            if is_baseline:
                self.beats.append(run)
            else:
                self._places.append((into, arm.name, len(self.beats)))

    def note_what_is_beside(self) -> None:
        """Store in each run the time per token of the reference arm's nearest runs, one before it and one after it."""
        for into, name, before in self._places:
            if name in into:
                into[name] = replace(into[name], beside_s=_mean_s(self.beats[before - 1 : before + 1]))

    def checks(self) -> dict[str, Check]:
        """Return the worst check of each arm's outputs, by name."""
        checks: dict[str, Check] = {}
        for arm in self._arms:
            if arm.name not in self.first:
                continue
            first, later = self.first[arm.name], [self.last[arm.name]] if arm.name in self.last else []
            baseline = named(self._arms, arm.baseline or self._baseline)
            if arm.name == self._baseline:
                later = self.beats[1:]
            with self._noted(arm):
                checks[arm.name] = _worse(
                    check(arm, self._text, self._expected(arm), first.tokens, baseline),
                    *(check(arm, self._text, first.tokens, run.tokens, arm) for run in later),
                )
        return checks

    def _expected(self, arm: Arm) -> Sequence[int]:
        """Return the tokens that the arm must write; none for the run's reference arm before its first run."""
        if arm.lossy:
            return self._references[arm.name]
        baseline = arm.baseline or self._baseline
        if arm.name == self._baseline:
            return self.first[baseline].tokens if baseline in self.first else ()
        if baseline not in self.first:
            raise ArmError(f"arm {arm.name!r}: its reference arm {baseline} did not decode")
        return self.first[baseline].tokens


def parted(arms: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Split arms into a number of parts of about equal size; into fewer if there are fewer arms."""
    ends = [len(arms) * part // parts for part in range(parts + 1)]
    return [part for start, end in pairwise(ends) if (part := arms[start:end])]


def _middle(beats: Sequence[Run]) -> Run | None:
    """Return the middle run, with the time of the two runs beside it; None if there are fewer than three."""
    if len(beats) < 3:
        return None
    middle = len(beats) // 2
    return replace(beats[middle], beside_s=_mean_s([beats[middle - 1], beats[middle + 1]]))


def _mean_s(runs: Sequence[Run]) -> float:
    """Return the geometric mean of the runs' seconds per token."""
    return statistics.geometric_mean(run.s_per_token for run in runs)


def _worse(*checks: Check) -> Check:
    """Return the worst of several checks."""
    return max(checks, key=get_args(Check).index)


def steady_run(steady: Steady, once: Callable[[], Run]) -> Run:
    """Measure a run, and measure it again if other work disturbs it. Store the number of tries in it."""
    kept = steady.measure(once)
    return replace(kept.value, tries=kept.tries, disturbed=kept.disturbed)
