"""Paired timing of two functions, and the gate's verdict on the new one. They need not use a language model."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

from specdecode.bench.gate.verdicts import (
    COUNTER_TOLERANCE,
    Judgement,
    Tolerance,
    Verdict,
    counters_judgement,
    time_judgement,
)
from specdecode.bench.measure.steady import Steady
from specdecode.bench.report.captions import duration
from specdecode.bench.runs.statistics import Estimate, contrast, robust_floor, robust_ratio
from specdecode.support.call_stack import with_stack_room
from specdecode.support.checked import LEAST_SECONDS

SECONDS = 5.0
"""Default seconds for timing two functions."""

LEAST_BLOCKS = 6
"""Least number of blocks, whatever their duration: an interval needs this many."""

_LEAST_SAMPLE_S = 2e-3  # long enough that the clock's ticks and the loop's overhead are negligible
_LONG_SAMPLE_S = 0.1
_MOST_LOOPS = 1 << 20
_ALIKE = 2.0  # functions with a ratio of times below this count as equally long
_SECONDS_BETWEEN_COLLECTIONS = 0.5
_STRETCH_S = 0.2  # the system counts processor time in steps of a hundredth of a second

Timer = Callable[[int], float]
"""A function that makes a number of calls and returns their total seconds."""


@dataclass(frozen=True, slots=True)
class PairedBlock:
    """Two timings of each function, in the order A B B A.

    Attributes:
        new, old: seconds a call, in the function's first and second timing.
        new_first: whether the new function is A.
    """

    new: tuple[float, float]
    old: tuple[float, float]
    new_first: bool

    @property
    def log_ratio(self) -> float:
        """Return the logarithm of the old function's time over the new function's. A drift linear in time cancels."""
        return (math.log(self.old[0] / self.new[0]) + math.log(self.old[1] / self.new[1])) / 2

    @property
    def noise(self) -> float:
        """Return the noise of `log_ratio`, see `contrast`."""
        return contrast(self.new, self.old, self.new_first)


@dataclass(frozen=True, slots=True)
class TimedFunction:
    """One of the two compared functions.

    Attributes:
        name: its name in sentences.
        value: its returned value.
        time: timer of its calls.
        counters: counts by name that do not depend on the clock; lower is better.
        worker: id of the process that runs it; None for this process.
    """

    name: str
    value: Any
    time: Timer
    counters: Mapping[str, float] = field(default_factory=dict)
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class Paired:
    """The measurements of two functions.

    Attributes:
        name: name of the test.
        new, old: the functions.
        loops: calls of the new and of the old function in each timing.
        blocks: the blocks, in the order of measuring.
        repeated: number of stretches that were measured again, because other work disturbed them.
        disturbed: number of stretches that other work disturbed in every try; the least disturbed try was kept.
    """

    name: str
    new: TimedFunction
    old: TimedFunction
    loops: tuple[int, int]
    blocks: Sequence[PairedBlock]
    repeated: int = 0
    disturbed: int = 0

    @property
    def floor(self) -> float:
        """Compute the A/A floor, in logarithms."""
        return robust_floor([block.noise for block in self.blocks])

    @property
    def change(self) -> Estimate:
        """Estimate the new function's speed over the old function's."""
        return robust_ratio([block.log_ratio for block in self.blocks], self.floor)

    @property
    def new_s(self) -> list[float]:
        """Return the seconds a call of the new function, in the order of measuring."""
        return [seconds for block in self.blocks for seconds in block.new]

    @property
    def old_s(self) -> list[float]:
        """Return the seconds a call of the old function, in the order of measuring."""
        return [seconds for block in self.blocks for seconds in block.old]

    def judge(self, tolerance: float) -> list[Judgement]:
        """Return the gate's judgement of the time, and of the counters if there are any.

        Args:
            tolerance: share by which the new function may be slower.
        """
        new_s, old_s = (duration(statistics.median(seconds)) for seconds in (self.new_s, self.old_s))
        what = f"{self.new.name} takes {new_s} and {self.old.name} {old_s}; new speed over old"
        time = time_judgement(self.name, what, self.change, Tolerance(tolerance), longer="more seconds")
        judgements = [replace(time, reason=f"{time.reason}{self._about_disturbances}")]
        return [*judgements, self._judge_counters()] if self.new.counters or self.old.counters else judgements

    @property
    def _about_disturbances(self) -> str:
        if not self.repeated:
            return ""
        left = f"; {self.disturbed} stayed disturbed" if self.disturbed else ""
        return f"; other work disturbed {self.repeated} stretches, which were measured again{left}"

    def _judge_counters(self) -> Judgement:
        new, old = self.new.counters, self.old.counters
        if lost := old.keys() - new.keys():
            reason = f"{self.new.name} lacks {', '.join(sorted(lost))}"
            return Judgement(self.name, "counters", Verdict.MISSING, reason)
        moved = {
            f"{name} {old[name]:.4g} -> {new[name]:.4g}": old[name] - new[name]
            for name in new
            if name in old and abs(new[name] - old[name]) > COUNTER_TOLERANCE * abs(old[name])
        }
        return counters_judgement(self.name, moved, f"{len(old)} counters within {COUNTER_TOLERANCE:.0%}")


def timer(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Return a timer of a function's calls.

    Garbage is collected between timings, at most twice a second, and never during one; objects that are in use are
    skipped the next time, until `gc.unfreeze`. The GPU is synchronised before and after each timing.
    """
    collected = -math.inf

    @with_stack_room
    def seconds(loops: int) -> float:
        nonlocal collected
        if clock() - collected > _SECONDS_BETWEEN_COLLECTIONS:
            gc.collect()
            gc.freeze()
            collected = clock()
        enabled = gc.isenabled()
        gc.disable()
        try:
            _synchronise()
            started = clock()
            for _ in repeat(None, loops):
                call()
            _synchronise()
            return clock() - started
        finally:
            if enabled:
                gc.enable()

    return seconds


def _synchronise() -> None:
    """Wait for queued work of the GPU, if this process uses one through PyTorch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        from specdecode.backends.device import synchronise  # imports PyTorch, which other projects may not need

        synchronise(torch.device("cuda"))


def measure_paired(
    name: str,
    new: TimedFunction,
    old: TimedFunction,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
    again: float = 1.0,
) -> Paired:
    """Time two functions in turns. Both must have been called once already.

    Args:
        name: name of the test.
        new, old: the functions.
        seconds: time for all blocks, without repeated stretches; `LEAST_BLOCKS` blocks may take longer. A stretch that
            other work disturbs is measured again.
        clock: returns seconds.
        progress: called with the seconds passed, the expected seconds of all blocks, and the test's name.
        again: the most time for measuring again, as a share of the rest.
    """
    blocks: list[PairedBlock] = []

    def stretch() -> list[PairedBlock]:
        """Measure some blocks, for at least `_STRETCH_S`: the share of other work in a shorter time is unknown."""
        begun, some = clock(), list[PairedBlock]()
        while not some or clock() - begun < _STRETCH_S:
            some.append(_block(new.time, old.time, loops, new_first=(len(blocks) + len(some)) % 2 == 0))
        return some

    steady = Steady([side.worker for side in (new, old) if side.worker is not None], bound=again)
    repeated = disturbed = 0
    try:
        loops = _loops(new.time, old.time)
        started, passed = clock(), 0.0
        while len(blocks) < LEAST_BLOCKS or passed < seconds:
            kept = steady.measure(stretch)
            blocks += kept.value
            repeated, disturbed = repeated + (kept.tries > 1), disturbed + kept.disturbed
            passed = clock() - started - steady.again_s
            progress(round(passed), round(max(seconds, passed * LEAST_BLOCKS / len(blocks))), name)
    finally:
        gc.unfreeze()
    return Paired(name, new, old, loops, blocks, repeated, disturbed)


def _block(new: Timer, old: Timer, loops: tuple[int, int], new_first: bool) -> PairedBlock:
    """Time one block, with each function's own number of calls."""
    sides = ((new, loops[0]), (old, loops[1]))
    outer, inner = sides if new_first else sides[::-1]
    a_1, b_1, b_2, a_2 = (max(time_of(calls), LEAST_SECONDS) / calls for time_of, calls in (outer, inner, inner, outer))
    if new_first:
        return PairedBlock((a_1, a_2), (b_1, b_2), new_first)
    return PairedBlock((b_1, b_2), (a_1, a_2), new_first)


def _loops(new: Timer, old: Timer) -> tuple[int, int]:
    """Return the number of calls of each function in one timing: enough for the resolution of the clock.

    Functions of similar time get the same number, because other work disturbs a longer timing more often.
    """
    new_s, old_s = _seconds_a_call(new), _seconds_a_call(old)
    if max(new_s, old_s) < _ALIKE * min(new_s, old_s):
        new_s = old_s = min(new_s, old_s)
    return _calls(new_s), _calls(old_s)


def _calls(seconds: float) -> int:
    return min(_MOST_LOOPS, math.ceil(_LEAST_SAMPLE_S / seconds))


def _seconds_a_call(time_of: Timer) -> float:
    """Return the least seconds of a call, from samples with more and more calls until they are long enough."""
    loops, least = 1, math.inf
    while True:
        # A short sample is taken twice, as other work may disturb one. It hardly changes a long sample.
        least = min(least, (seconds := max(time_of(loops), LEAST_SECONDS)) / loops)
        if seconds < _LONG_SAMPLE_S:
            least = min(least, max(time_of(loops), LEAST_SECONDS) / loops)
        if least * loops >= _LEAST_SAMPLE_S or loops >= _MOST_LOOPS:
            return least
        loops *= 2
