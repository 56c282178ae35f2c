"""Time two functions in turns, and judge the new one by the old: any code, with or without a language model."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from types import MappingProxyType
from typing import Any

from specdecode.bench.gate.verdicts import COUNTER_TOLERANCE, Judgement, Verdict, time_judgement
from specdecode.bench.runs.statistics import Estimate, robust_floor, robust_ratio

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
class Paired:
    """What was measured of two functions.

    Attributes:
        name: of the test.
        blocks: in the order of measuring.
        loops: calls of each of a block's four times.
        new_counters, old_counters: by name, what does not depend on the clock; less is better.
    """

    name: str
    blocks: Sequence[PairedBlock]
    loops: int
    new_counters: Mapping[str, float] = field(default_factory=dict)
    old_counters: Mapping[str, float] = field(default_factory=dict)

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
        what = "speed over the old function's"
        judgements = [time_judgement(self.name, what, self.change, tolerance, longer="more seconds")]
        return [*judgements, self._judge_counters()] if self.new_counters or self.old_counters else judgements

    def _judge_counters(self) -> Judgement:
        new, old = self.new_counters, self.old_counters
        if lost := old.keys() - new.keys():
            return Judgement(
                self.name, "counters", Verdict.MISSING, f"the new function lacks {', '.join(sorted(lost))}"
            )
        moved = {
            f"{name} {old[name]:.4g} -> {new[name]:.4g}": new[name] - old[name]
            for name in new
            if name in old and abs(new[name] - old[name]) > COUNTER_TOLERANCE * abs(old[name])
        }
        if not moved:
            reason = f"{len(new)} counters within {COUNTER_TOLERANCE:.0%}"
            return Judgement(self.name, "counters", Verdict.PASS, reason)
        verdict = Verdict.REGRESSED if max(moved.values()) > 0 else Verdict.IMPROVED
        return Judgement(self.name, "counters", verdict, ", ".join(moved))


def timer(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Return what times calls of a function together, the device synchronised before and after."""

    def seconds(loops: int) -> float:
        _synchronise()
        started = clock()
        for _ in repeat(None, loops):
            call()
        _synchronise()
        return clock() - started

    return seconds


def _synchronise() -> None:
    """Wait for a GPU's queued work, if this process uses one by PyTorch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure_paired(
    name: str,
    new: Timer,
    old: Timer,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    new_counters: Mapping[str, float] = MappingProxyType({}),
    old_counters: Mapping[str, float] = MappingProxyType({}),
) -> Paired:
    """Time two functions in turns, which were called before.

    Args:
        name: of the test.
        new, old: their timers.
        seconds: for all blocks; the least number of blocks may take longer.
        clock: in seconds.
        new_counters, old_counters: of the result.
    """
    loops = _loops(new, old)
    blocks: list[PairedBlock] = []
    started = collected = clock()
    gc.collect()
    gc.disable()
    try:
        while len(blocks) < LEAST_BLOCKS or clock() - started < seconds:
            new_first = len(blocks) % 2 == 0
            outer, inner = (new, old) if new_first else (old, new)
            a_1, b_1, b_2, a_2 = (time_of(loops) / loops for time_of in (outer, inner, inner, outer))
            pairs = ((a_1, a_2), (b_1, b_2))
            blocks.append(PairedBlock(*(pairs if new_first else pairs[::-1]), new_first))
            if clock() - collected > _SECONDS_BETWEEN_COLLECTIONS:
                gc.collect()
                collected = clock()
    finally:
        gc.enable()
    return Paired(name, blocks, loops, new_counters, old_counters)


def _loops(new: Timer, old: Timer) -> int:
    """Return how many calls the clock can tell apart, of both functions."""
    loops = 1
    while loops < _MOST_LOOPS and min(new(loops), old(loops)) < _LEAST_SAMPLE_S:
        loops *= 2
    return loops
