"""Repetition of disturbed measurements, by a rule that does not look at the measured values."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from specdecode.support.disturbance import watch

if TYPE_CHECKING:
    import torch

MARGIN = 0.02
"""A measurement is disturbed if other work uses this much more of the processors' time than usual, as a share."""

MOST_TRIES = 4
"""The most tries of one measurement, the first included."""

# The usual share of other work is taken as zero until there are enough measurements.
_PRIOR = [0.0, 0.0, 0.0]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Steadied(Generic[T]):
    """The least disturbed of several tries of one measurement.

    Attributes:
        value: result of the measurement.
        tries: number of tries.
        disturbed: whether other work disturbed all tries.
    """

    value: T
    tries: int
    disturbed: bool


@dataclass(slots=True)
class Steady:
    """A measurer that repeats a measurement at once if other work used more of the processors' time than usual.

    The rule depends neither on the arm or version, nor on the measured time. So it favours no arm and no version.

    Attributes:
        workers: ids of the processes that work for this process.
        device: device that these processes use.
        bound: the most seconds of further tries, as a share of the seconds of first tries.
        shares: share of the processors' time that other work used, for each kept measurement.
        first_s, again_s: seconds of all first tries, and of all further tries.
        watch: begins to measure the share of other work; `support.disturbance.watch` if None.
        clock: returns seconds.
        agreed: returns the first process's value among processes that measure together; the same value for one process.
    """

    workers: Collection[int] = ()
    device: torch.device | None = None
    bound: float = 1.0
    shares: list[float] = field(default_factory=list)
    first_s: float = 0.0
    again_s: float = 0.0
    watch: Callable[[], Callable[[], float | None]] | None = None
    clock: Callable[[], float] = time.perf_counter
    agreed: Callable[[Any], Any] = field(default=lambda value: value)

    def measure(self, once: Callable[[], T]) -> Steadied[T]:
        """Measure until a try is undisturbed, within the limits on tries and time. Return the least disturbed try."""
        value, taken, seconds = self._try(once)
        self.first_s += seconds
        tries = 1
        while self._disturbed(taken) and tries < MOST_TRIES and self.again_s + seconds <= self.bound * self.first_s:
            other, other_taken, seconds = self._try(once)
            self.again_s += seconds
            tries += 1
            if other_taken < taken:
                value, taken = other, other_taken
        self.shares.append(taken)
        return Steadied(value, tries, self._disturbed(taken))

    def begin_watch(self) -> Callable[[], float | None]:
        """Begin to measure the share of other work."""
        return watch(*self.workers, device=self.device) if self.watch is None else self.watch()

    def _try(self, once: Callable[[], T]) -> tuple[T, float, float]:
        share = self.begin_watch()
        started = self.clock()
        value = once()
        measured: tuple[T, float, float] = self.agreed((value, share() or 0.0, self.clock() - started))
        return measured

    def _disturbed(self, taken: float) -> bool:
        """Return whether other work used more than usual, by `MARGIN`."""
        return taken > usual(self.shares) + MARGIN


def usual(shares: Sequence[float]) -> float:
    """Return the usual share of other work: the lower quartile of the shares so far."""
    before = sorted([*_PRIOR, *shares])
    return before[math.ceil(len(before) / 4) - 1]
