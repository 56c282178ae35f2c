"""Measure one block: a prompt decoded by every arm, with what they are compared with first, last and in between."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar, get_args

from specdecode.backends.graph import CudaGraphs
from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.check import Check, check
from specdecode.bench.measure.output_stats import own_losses, with_output_stats
from specdecode.bench.measure.steady import Steady
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import NOISE_OF_TWO
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy

# A run whose drafts depend on the clock may meet new shapes each time.
_MOST_CAPTURING_RUNS = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Block:
    """One prompt decoded by every arm, baselines first and last: what is compared was measured together.

    The run's baseline is measured between the arms, too: each is compared with the runs of it right before and after.

    Attributes:
        prompt: its id.
        repeat: which block of this prompt it is, from 0.
        runs: by arm, the first ones of baselines among them.
        last: by baseline, its last run.
        middle: of the runs of the run's baseline between the others, the one in the middle; None if there is none.
        checks: by arm: "equal" to its baseline's output; "tie", if it left it where the target is undecided within its
            rounding; or "bug", if it is wrong, which voids its time.
    """

    prompt: str
    repeat: int
    runs: dict[str, Run]
    last: dict[str, Run]
    checks: dict[str, Check]
    middle: Run | None = None

    def log_speedup(self, arm: str, baseline: str) -> float:
        """Return the logarithm of an arm's speedup over the run's baseline, which the two runs of a baseline share.

        For equal outputs the time per token compares as well as the time of the whole.
        """
        if arm == baseline:
            return 0.0
        runs = self._runs_of(arm)
        beside = [run.beside_s for run in runs if run.beside_s is not None]
        if len(beside) < len(runs):  # cut at a shorter length
            return self.log_s(baseline) - self.log_s(arm)
        return statistics.fmean(map(math.log, beside)) - self.log_s(arm)

    def log_s(self, arm: str) -> float:
        """Return the logarithm of the seconds a token took, the mean of a baseline's two runs."""
        return statistics.fmean(math.log(run.s_per_token) for run in self._runs_of(arm))

    def _runs_of(self, arm: str) -> list[Run]:
        return [self.runs[arm], self.last[arm]] if arm in self.last else [self.runs[arm]]

    def change(self, baseline: str) -> float:
        """Return the logarithm of a baseline's first time per token over its last."""
        return math.log(self.runs[baseline].s_per_token / self.last[baseline].s_per_token)

    def noise(self, baseline: str) -> float:
        """Return a logarithm as `log_speedup` would if the arm were the run's baseline: it is, in the middle run."""
        if self.middle is None or self.middle.beside_s is None:
            return NOISE_OF_TWO * self.change(baseline)
        return math.log(self.middle.beside_s / self.middle.s_per_token)

    def drift(self, baseline: str) -> tuple[float, float]:
        """Return by how much the runs of the run's baseline differ that are far apart, and those that are near."""
        return self.change(baseline), self.noise(baseline)

    def at(self, length: int) -> Block:
        """Return the block as it was when its runs had got to a length, without those that stopped before that."""
        runs = {arm: cut for arm, run in self.runs.items() if (cut := run.at(length)) is not None}
        last = {arm: cut for arm, run in self.last.items() if (cut := run.at(length)) is not None and arm in runs}
        return replace(
            self,
            runs={arm: run for arm, run in runs.items() if arm in last or arm not in self.last},
            last=last,
            middle=None,
        )


def named(arms: Sequence[Arm], name: str) -> Arm:
    """Return the arm of a name."""
    return next(arm for arm in arms if arm.name == name)


def baselines_of(arms: Sequence[Arm], baseline: str) -> list[Arm]:
    """Return the arms that others are compared with, the run's baseline first."""
    others = {arm.baseline for arm in arms} - {None, baseline}
    return [named(arms, baseline), *(arm for arm in arms if arm.name in others)]


@contextmanager
def closing(arms: Sequence[Arm], failures: dict[str, str]) -> Iterator[None]:
    """Close the arms after the block, whatever happens in it."""
    try:
        yield
    finally:
        for arm in arms:
            with noted(arm, failures):
                arm.close()


@contextmanager
def noted(arm: Arm, failures: dict[str, str] | None) -> Iterator[None]:
    """Note that an arm from code failed, so that the others go on; raise where nobody takes notes."""
    try:
        yield
    except ArmError as error:
        if failures is None:
            raise
        failures[arm.name] = str(error)


def measure_block(
    arms: Sequence[Arm],
    prompt: str,
    text: Sequence[int],
    max_new_tokens: int,
    repeat: int = 0,
    seed: int = 0,
    tell: Callable[[str], None] = lambda doing: None,
    failures: dict[str, str] | None = None,
    baseline: str = BASELINE,
    steady: Steady | None = None,
    parts: int = 2,
) -> Block:
    """Measure the arms, their baselines among them, on one prompt.

    Args:
        arms: as for `experiment`.
        prompt: its id.
        text: its tokens.
        max_new_tokens: length of every output, unless a stop token of the arms ends it.
        repeat: which block of this prompt it is, from 0.
        seed: of the order of arms.
        tell: told what is going on, run by run.
        failures: takes what arms from code did in place of decoding; they are not in the block. If None, the first
            ends the measuring.
        baseline: the arm that others are compared with, unless they name another. If it fails, that ends the measuring.
        steady: measures again what other work disturbed, and knows the blocks before; a new one if None.
        parts: how many parts the run's baseline parts the other arms into, if there are so many.
    """
    baselines = baselines_of(arms, baseline)
    others = [arm for arm in arms if arm not in baselines]
    order = random.Random(f"{seed} {prompt} {repeat}").sample(others, len(others))
    runs = _Runs(arms, baselines, text, max_new_tokens, steady or Steady(), failures)

    def run(arm: Arm, into: dict[str, Run]) -> None:
        tell(f"{arm.name} on {prompt}")
        runs.run(arm, into)

    for arm in baselines:
        run(arm, runs.first)
    for part in parted(order, parts):
        if part[0] is not order[0]:
            runs.run(baselines[0], {})
        for arm in part:
            run(arm, runs.first)
    for arm in reversed(baselines):
        if arm.name in runs.first:
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
    return Block(prompt, repeat, first, runs.last, checks, _middle(runs.beats))


class _Runs:
    """The runs of a block.

    Args:
        arms: all.
        baselines: those that others are compared with, the run's baseline first.
        text: tokens of the prompt.
        length: of every output.
        steady: measures again what other work disturbed.
        failures: takes what arms from code did in place of decoding; if None, the first is raised.

    Attributes:
        first, last: by arm.
        beats: all runs of the run's baseline, in order.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        baselines: Sequence[Arm],
        text: Sequence[int],
        length: int,
        steady: Steady,
        failures: dict[str, str] | None,
    ) -> None:
        self.first: dict[str, Run] = {}
        self.last: dict[str, Run] = {}
        self.beats: list[Run] = []
        self._arms, self._baseline, self._text, self._length = arms, baselines[0].name, text, length
        self._steady, self._failures = steady, failures
        # Where each run is kept, and how many of the baseline came before.
        self._places: list[tuple[dict[str, Run], str, int]] = []
        # What is to be written, and the prompt's own shapes, so that the first timed run is not their first.
        lossy = any(arm.lossy for arm in arms)
        written = baselines[0].run(text, length if lossy else 1, ()).tokens
        self._references = _references(arms, text, written, length)
        for arm in baselines[1:]:
            with noted(arm, failures):
                arm.run(text, 1, ())

    def run(self, arm: Arm, into: dict[str, Run]) -> None:
        """Measure an arm. If it fails it is in none of the runs."""
        is_baseline = arm.name == self._baseline
        with noted(arm, None if is_baseline else self._failures):
            expected = self._expected(arm)
            run = into[arm.name] = steady_run(self._steady, lambda: timed(arm, self._text, self._length, expected))
            if is_baseline:
                self.beats.append(run)
            else:
                self._places.append((into, arm.name, len(self.beats)))

    def note_what_is_beside(self) -> None:
        """Note for each run how fast the baseline was right before and after it."""
        for into, name, before in self._places:
            if name in into:
                into[name] = replace(into[name], beside_s=_mean_s(self.beats[before - 1 : before + 1]))

    def checks(self) -> dict[str, Check]:
        """Check what each arm wrote, in all of its runs."""
        checks: dict[str, Check] = {}
        for arm in self._arms:
            if arm.name not in self.first:
                continue
            first, later = self.first[arm.name], [self.last[arm.name]] if arm.name in self.last else []
            own = named(self._arms, arm.baseline or self._baseline)
            if arm.name == self._baseline:
                later = self.beats[1:]
            with noted(arm, self._failures):
                checks[arm.name] = _worse(
                    check(arm, self._text, self._expected(arm), first.tokens, own),
                    *(check(arm, self._text, first.tokens, run.tokens, arm) for run in later),
                )
        return checks

    def _expected(self, arm: Arm) -> Sequence[int]:
        """Return what the arm is to write; nothing for a baseline that has not run yet."""
        if arm.lossy:
            return self._references[arm.name]
        own = arm.baseline or self._baseline
        if arm.name == self._baseline:
            return self.first[own].tokens if own in self.first else ()
        if own not in self.first:
            raise ArmError(f"arm {arm.name!r}: its baseline {own} did not decode")
        return self.first[own].tokens


def parted(arms: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Part arms into so many parts of about equally many, fewer where there are fewer arms."""
    ends = [len(arms) * part // parts for part in range(parts + 1)]
    return [part for start, end in pairwise(ends) if (part := arms[start:end])]


def _middle(beats: Sequence[Run]) -> Run | None:
    """Return the run in the middle, with the time of those beside it; None if there are but two."""
    if len(beats) < 3:
        return None
    middle = len(beats) // 2
    return replace(beats[middle], beside_s=_mean_s([beats[middle - 1], beats[middle + 1]]))


def _mean_s(runs: Sequence[Run]) -> float:
    """Return the geometric mean of the runs' seconds per token."""
    return statistics.geometric_mean(run.s_per_token for run in runs)


def _references(
    arms: Sequence[Arm], text: Sequence[int], written: Sequence[int], length: int
) -> dict[str, Sequence[int]]:
    """Return what each lossy arm must write: arms of the same weights and policy the same."""
    by_loss: dict[tuple[LM | None, CachePolicy], Sequence[int]] = {}
    for arm in arms:
        if arm.lossy and (arm.target, arm.policy) not in by_loss:
            by_loss[arm.target, arm.policy] = arm.expected(text, written, length)
    return {arm.name: by_loss[arm.target, arm.policy] for arm in arms if arm.lossy}


def _worse(*checks: Check) -> Check:
    """Return the worst of several checks."""
    return max(checks, key=get_args(Check).index)


def steady_run(steady: Steady, once: Callable[[], Run]) -> Run:
    """Measure a run until other work does not disturb it, and note in it how often that took."""
    kept = steady.measure(once)
    return replace(kept.value, tries=kept.tries, disturbed=kept.disturbed)


def timed(arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
    """Run the arm once, with garbage collected before it and not during it.

    A run that captured CUDA graphs is run again: the next one replays them.
    """
    gc.collect()
    gc.disable()
    try:
        for _ in range(_MOST_CAPTURING_RUNS):
            before = CudaGraphs.count
            run = arm.run(prompt, length, expected)
            if CudaGraphs.count == before:
                break
        return run
    finally:
        gc.enable()
