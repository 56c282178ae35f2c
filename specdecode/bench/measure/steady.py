"""Measure again what other work disturbed: by a rule that does not look at what was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from specdecode.support.disturbance import watch

if TYPE_CHECKING:
    import torch

MARGIN = 0.02
"""How much more of the processors' time than usual others take from a disturbed measurement, as a share."""

MOST_TRIES = 4
"""How often one thing is measured, the first time among them."""

# Nothing is what others usually take, until measurements say otherwise.
_PRIOR = [0.0, 0.0, 0.0]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Steadied(Generic[T]):
    """The least disturbed of some tries of the same.

    Attributes:
        value: what it gave.
        tries: how often it was measured.
        disturbed: whether other work disturbed all of them.
    """

    value: T
    tries: int
    disturbed: bool


@dataclass(slots=True)
class Steady:
    """Measure, and measure again at once where other work took more of the processors than usual.

    Whose measurement it is plays no part, nor how long it took. So no arm and no version gets better chances.

    Attributes:
        workers: ids of the processes that work for this one.
        device: that they use.
        bound: the most seconds that are spent again, as a share of those of the first tries.
        shares: of the processors' time that others took from the measurements that were kept.
        first_s, again_s: seconds of all first tries, and of the others.
        watch: begins to watch what others take; `support.disturbance.watch` if None.
        clock: in seconds.
        agreed: of processes that measure together, the first one's value; the value itself of one process.
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
        """Measure until nothing disturbs it, as long as tries and time allow."""
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

    def _try(self, once: Callable[[], T]) -> tuple[T, float, float]:
        share = watch(*self.workers, device=self.device) if self.watch is None else self.watch()
        started = self.clock()
        value = once()
        measured: tuple[T, float, float] = self.agreed((value, share() or 0.0, self.clock() - started))
        return measured

    def _disturbed(self, taken: float) -> bool:
        """Whether others took more than usual: than the lower quartile of the measurements so far."""
        before = sorted([*_PRIOR, *self.shares])
        return taken > before[math.ceil(len(before) / 4) - 1] + MARGIN
