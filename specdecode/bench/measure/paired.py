"""Time two functions in turns, and judge the new one by the old: any code, with or without a language model."""

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

from specdecode.bench.gate.verdicts import COUNTER_TOLERANCE, Judgement, Tolerance, Verdict, time_judgement
from specdecode.bench.measure.steady import Steady
from specdecode.bench.report.captions import duration
from specdecode.bench.runs.statistics import Estimate, robust_floor, robust_ratio
from specdecode.support.checked import LEAST_SECONDS

SECONDS = 5.0
"""How long two functions are timed, where the test does not say."""

LEAST_BLOCKS = 6
"""Blocks that are timed however long they take: an interval needs as many."""

_LEAST_SAMPLE_S = 2e-3  # a clock's ticks, and what a loop costs, are nothing beside it
_LONG_SAMPLE_S = 0.1
_MOST_LOOPS = 1 << 20
_ALIKE = 2.0  # times of a call whose ratio is below
_SECONDS_BETWEEN_COLLECTIONS = 0.5
_STRETCH_S = 0.2  # the system counts processor time in steps of a hundredth of a second

Timer = Callable[[int], float]
"""From a number of calls to the seconds that they take together."""


@dataclass(frozen=True, slots=True)
class PairedBlock:
    """Both functions timed twice each, in the order A B B A.

    Attributes:
        new, old: seconds a call, of the first and of the second time.
        new_first: whether the new function is A.
    """

    new: tuple[float, float]
    old: tuple[float, float]
    new_first: bool

    @property
    def log_ratio(self) -> float:
        """Return the logarithm of the old function's time over the new one's. A drift linear in time cancels."""
        return (math.log(self.old[0] / self.new[0]) + math.log(self.old[1] / self.new[1])) / 2

    @property
    def noise(self) -> float:
        """Return the same between equal functions: the contrast (-1, 3, -3, 1) of the four times, over the root of 20.

        It compares each function with itself alone, and varies as much as `log_ratio`.
        """
        outer, inner = (self.new, self.old) if self.new_first else (self.old, self.new)
        return (math.log(outer[1] / outer[0]) - 3 * math.log(inner[1] / inner[0])) / math.sqrt(20)


@dataclass(frozen=True, slots=True)
class Side:
    """One of two functions that are compared.

    Attributes:
        name: in sentences.
        value: what it returned.
        time: times its calls.
        counters: by name, what does not depend on the clock; less is better.
        worker: id of the process that runs it; None if this one does.
    """

    name: str
    value: Any
    time: Timer
    counters: Mapping[str, float] = field(default_factory=dict)
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class Paired:
    """What was measured of two functions.

    Attributes:
        name: of the test.
        new, old: the functions.
        loops: calls of the new and of the old one in each of their times.
        blocks: in the order of measuring.
        repeated: number of stretches that other work disturbed and that were measured again.
        disturbed: number of those that it disturbed in each try, and that were kept.
    """

    name: str
    new: Side
    old: Side
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
        """Estimate the new function's speed over the old one's."""
        return robust_ratio([block.log_ratio for block in self.blocks], self.floor)

    @property
    def new_s(self) -> list[float]:
        """Return the seconds a call of the new function, in order."""
        return [seconds for block in self.blocks for seconds in block.new]

    @property
    def old_s(self) -> list[float]:
        """Return the seconds a call of the old function, in order."""
        return [seconds for block in self.blocks for seconds in block.old]

    def judge(self, tolerance: float) -> list[Judgement]:
        """Judge the time, and the counters if there are any.

        Args:
            tolerance: share by which the new function may be slower.
        """
        new_s, old_s = (duration(statistics.median(seconds)) for seconds in (self.new_s, self.old_s))
        what = f"{self.new.name} takes {new_s} and {self.old.name} {old_s}, speed over it"
        time = time_judgement(self.name, what, self.change, Tolerance(tolerance), longer="more seconds")
        judgements = [replace(time, reason=f"{time.reason}{self._about_disturbances}")]
        return [*judgements, self._judge_counters()] if self.new.counters or self.old.counters else judgements

    @property
    def _about_disturbances(self) -> str:
        if not self.repeated:
            return ""
        left = f", {self.disturbed} of them in vain" if self.disturbed else ""
        return f"; other work disturbed {self.repeated} stretches, which were measured again{left}"

    def _judge_counters(self) -> Judgement:
        new, old = self.new.counters, self.old.counters
        if lost := old.keys() - new.keys():
            reason = f"{self.new.name} lacks {', '.join(sorted(lost))}"
            return Judgement(self.name, "counters", Verdict.MISSING, reason)
        moved = {
            f"{name} {old[name]:.4g} -> {new[name]:.4g}": new[name] - old[name]
            for name in new
            if name in old and abs(new[name] - old[name]) > COUNTER_TOLERANCE * abs(old[name])
        }
        if not moved:
            reason = f"{len(old)} counters within {COUNTER_TOLERANCE:.0%}"
            return Judgement(self.name, "counters", Verdict.PASS, reason)
        verdict = Verdict.REGRESSED if max(moved.values()) > 0 else Verdict.IMPROVED
        return Judgement(self.name, "counters", verdict, ", ".join(moved))


def timer(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Return what times calls of a function together.

    Garbage is collected before now and then, and never within. A GPU's queue is empty before and after.
    """
    collected = -math.inf

    def seconds(loops: int) -> float:
        nonlocal collected
        if clock() - collected > _SECONDS_BETWEEN_COLLECTIONS:
            gc.collect()
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
    """Wait for a GPU's queued work, if this process uses one by PyTorch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        from specdecode.backends.device import synchronise  # imports PyTorch, which other projects do without

        synchronise(torch.device("cuda"))


def measure_paired(
    name: str,
    new: Side,
    old: Side,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
    again: float = 1.0,
) -> Paired:
    """Time two functions in turns, which were called before.

    Args:
        name: of the test.
        new, old: the functions.
        seconds: for all blocks; the least number of blocks may take longer. Stretches of them that other work disturbs
            are measured again.
        clock: in seconds.
        progress: told the seconds that have passed, those of all blocks, and the test.
        again: the most time spent on measuring again, as a share of the rest.
    """
    loops = _loops(new.time, old.time)
    blocks: list[PairedBlock] = []

    def stretch() -> list[PairedBlock]:
        """Measure some blocks: what other work took is not known of a shorter time."""
        begun, some = clock(), list[PairedBlock]()
        while not some or clock() - begun < _STRETCH_S:
            some.append(_block(new.time, old.time, loops, new_first=(len(blocks) + len(some)) % 2 == 0))
        return some

    steady = Steady([side.worker for side in (new, old) if side.worker is not None], bound=again)
    repeated = disturbed = 0
    started, passed = clock(), 0.0
    while len(blocks) < LEAST_BLOCKS or passed < seconds:
        kept = steady.measure(stretch)
        blocks += kept.value
        repeated, disturbed = repeated + (kept.tries > 1), disturbed + kept.disturbed
        passed = clock() - started - steady.again_s
        progress(round(passed), round(max(seconds, passed * LEAST_BLOCKS / len(blocks))), name)
    return Paired(name, new, old, loops, blocks, repeated, disturbed)


def _block(new: Timer, old: Timer, loops: tuple[int, int], new_first: bool) -> PairedBlock:
    """Time one block, each function with its own number of calls."""
    sides = ((new, loops[0]), (old, loops[1]))
    outer, inner = sides if new_first else sides[::-1]
    a_1, b_1, b_2, a_2 = (max(time_of(calls), LEAST_SECONDS) / calls for time_of, calls in (outer, inner, inner, outer))
    if new_first:
        return PairedBlock((a_1, a_2), (b_1, b_2), new_first)
    return PairedBlock((b_1, b_2), (a_1, a_2), new_first)


def _loops(new: Timer, old: Timer) -> tuple[int, int]:
    """Return how many calls of each the clock tells apart.

    Functions that take about as long get the same number: a neighbour disturbs longer times more often.
    """
    new_s, old_s = _seconds_a_call(new), _seconds_a_call(old)
    if max(new_s, old_s) < _ALIKE * min(new_s, old_s):
        new_s = old_s = min(new_s, old_s)
    return _calls(new_s), _calls(old_s)


def _calls(seconds: float) -> int:
    return min(_MOST_LOOPS, math.ceil(_LEAST_SAMPLE_S / seconds))


def _seconds_a_call(time_of: Timer) -> float:
    """Return the least time of a call in samples that grow until they are long enough."""
    loops, least = 1, math.inf
    while True:
        # One may be disturbed, but not into what is long.
        least = min(least, (seconds := max(time_of(loops), LEAST_SECONDS)) / loops)
        if seconds < _LONG_SAMPLE_S:
            least = min(least, max(time_of(loops), LEAST_SECONDS) / loops)
        if least * loops >= _LEAST_SAMPLE_S or loops >= _MOST_LOOPS:
            return least
        loops *= 2
