"""Runs of two versions in slices, in turns: a few steps of one, then the same steps of the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.steady import Steadied, Steady, usual

T = TypeVar("T")

SLICE_S = 0.1
"""Seconds of a slice, if each of its steps commits one token. A slice has at least one step. The machine's speed
changes less between short slices than between long ones."""

MARGIN = 0.05
"""A slice is disturbed if other work uses this much more of the processors' time than usual, as a share. The margin is
wider than that of a whole run, because the system counts such time in units of 10 ms."""

SlicedRun = Generator[None, None, tuple[Run, list[float]]]
"""A run that yields after each slice, and returns the run and the seconds of each slice."""


@dataclass(frozen=True, slots=True)
class RunPair:
    """A run of each version, measured in turns.

    Attributes:
        new, old: the runs.
        compared_s: seconds of the new and of the old version in the slices that are compared.
    """

    new: Run
    old: Run
    compared_s: tuple[float, float]

    @property
    def log_ratio(self) -> float:
        """Return the logarithm of the old version's time over the new version's."""
        new, old = self.compared_s
        return math.log(old / new)


class SteadySlices:
    """The rules for disturbed slices: such slices are left out, and a run with mostly such slices is measured again.

    The rules do not look at times, and a slice counts for both sides or for none. So the rules favour no side.

    Args:
        steady: the rule for disturbed runs, and the watch over other work.
    """

    def __init__(self, steady: Steady) -> None:
        self.steady = steady
        self._shares: list[float] = []  # of the processors' time that other work used, in each slice so far
        self._taken = 0.0
        self._runs = replace(steady, watch=lambda: lambda: self._taken, shares=[])

    def measure(self, once: Callable[[], T]) -> Steadied[T]:
        """Return the least disturbed of several runs in slices. Each must call `compared` or `compare_all`."""
        return self._runs.measure(once)

    def compared(self, taken: Sequence[float]) -> list[int]:
        """Return the numbers of the slices that are compared, given the share of other work during each."""
        self._shares += taken
        most = usual(self._shares) + MARGIN
        kept = [place for place, share in enumerate(taken) if share <= most]
        self._taken = 0.0
        if 2 * len(kept) < len(taken):
            self._taken, kept = statistics.median(taken), list(range(len(taken)))
        return kept

    def compare_all(self, taken: Sequence[float]) -> None:
        """Note the shares of a run whose slices cannot be compared one by one."""
        self._shares += taken
        self._taken = statistics.fmean(taken)


class Interleaver:
    """A measurer of pairs.

    Args:
        steady: the rule for disturbed runs, and the watch over other work.
    """

    def __init__(self, steady: Steady) -> None:
        self._slices = SteadySlices(steady)

    def measure(self, start: Callable[[], tuple[SlicedRun, SlicedRun]], new_first: bool) -> RunPair:
        """Return the least disturbed try of a pair.

        Args:
            start: starts a run of the new version and one of the old version, for each try.
            new_first: whether the new version has the first turn.

        Raises:
            ArmError: an arm from code does not decode in one of the versions.
        """
        kept = self._slices.measure(lambda: self._once(*start(), new_first))
        new, old = (
            replace(run, tries=kept.tries, disturbed=kept.disturbed) for run in (kept.value.new, kept.value.old)
        )
        return replace(kept.value, new=new, old=old)

    def _once(self, new: SlicedRun, old: SlicedRun, new_first: bool) -> RunPair:
        results: dict[SlicedRun, tuple[Run, list[float]]] = {}
        order, taken = [new, old] if new_first else [old, new], []
        while len(results) < len(order):
            share = self._slices.steady.begin_watch()
            for run in order:
                if run not in results:
                    try:
                        next(run)
                    except StopIteration as end:
                        results[run] = end.value
                    except ArmError:
                        _finish(order)
                        raise
            taken.append(share() or 0.0)
            order.reverse()
        return self._pair(*results[new], *results[old], taken)

    def _pair(self, new: Run, new_s: list[float], old: Run, old_s: list[float], taken: list[float]) -> RunPair:
        if not len(new_s) == len(old_s) == len(taken):
            self._slices.compare_all(taken)
            return RunPair(new, old, (new.total_s, old.total_s))
        kept = self._slices.compared(taken)
        new, old = (replace(run, slices=len(taken), left_out=len(taken) - len(kept)) for run in (new, old))
        return RunPair(new, old, (summed(new_s, kept), summed(old_s, kept)))


def summed(seconds: Sequence[float], places: Sequence[int]) -> float:
    """Return the seconds of some slices."""
    return sum(seconds[place] for place in places)


def _finish(runs: Sequence[SlicedRun]) -> None:
    """Finish the runs that still wait for their turn: otherwise their processes would wait for ever."""
    for run in runs:
        with suppress(ArmError):
            for _ in run:
                pass
