"""Time two functions in turns, and judge the new one by the old: any code, with or without a language model."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from specdecode.bench.gate.verdicts import COUNTER_TOLERANCE, Judgement, Tolerance, Verdict, time_judgement
from specdecode.bench.report.captions import duration
from specdecode.bench.runs.statistics import Estimate, robust_floor, robust_ratio
from specdecode.support.checked import LEAST_SECONDS

SECONDS = 5.0
"""How long two functions are timed, where the test does not say."""

LEAST_BLOCKS = 6
"""Blocks that are timed however long they take: an interval needs as many."""

_LEAST_SAMPLE_S = 2e-3  # a clock's ticks, and what a loop costs, are nothing beside it
_MOST_LOOPS = 1 << 20
_SECONDS_BETWEEN_COLLECTIONS = 0.5

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
    """

    name: str
    value: Any
    time: Timer
    counters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Paired:
    """What was measured of two functions.

    Attributes:
        name: of the test.
        new, old: the functions.
        loops: calls of the new and of the old one in each of their times.
        blocks: in the order of measuring.
    """

    name: str
    new: Side
    old: Side
    loops: tuple[int, int]
    blocks: Sequence[PairedBlock]

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
        judgements = [time_judgement(self.name, what, self.change, Tolerance(tolerance), longer="more seconds")]
        return [*judgements, self._judge_counters()] if self.new.counters or self.old.counters else judgements

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
) -> Paired:
    """Time two functions in turns, which were called before.

    Args:
        name: of the test.
        new, old: the functions.
        seconds: for all blocks; the least number of blocks may take longer.
        clock: in seconds.
        progress: told the seconds that have passed, those of all blocks, and the test.
    """
    loops = (_loops(new.time), _loops(old.time))
    blocks: list[PairedBlock] = []
    started, passed = clock(), 0.0
    while len(blocks) < LEAST_BLOCKS or passed < seconds:
        blocks.append(_block(new.time, old.time, loops, new_first=len(blocks) % 2 == 0))
        passed = clock() - started
        progress(round(passed), round(max(seconds, passed * LEAST_BLOCKS / len(blocks))), name)
    return Paired(name, new, old, loops, blocks)


def _block(new: Timer, old: Timer, loops: tuple[int, int], new_first: bool) -> PairedBlock:
    """Time one block, each function with its own number of calls."""
    sides = ((new, loops[0]), (old, loops[1]))
    outer, inner = sides if new_first else sides[::-1]
    a_1, b_1, b_2, a_2 = (max(time_of(calls), LEAST_SECONDS) / calls for time_of, calls in (outer, inner, inner, outer))
    if new_first:
        return PairedBlock((a_1, a_2), (b_1, b_2), new_first)
    return PairedBlock((b_1, b_2), (a_1, a_2), new_first)


def _loops(time_of: Timer) -> int:
    """Return how many calls the clock can tell apart."""
    loops = 1
    while loops < _MOST_LOOPS and time_of(loops) < _LEAST_SAMPLE_S:
        loops *= 2
    return loops
