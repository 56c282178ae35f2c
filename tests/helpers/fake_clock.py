"""A clock that moves only when told to, and models that tell it: what it measures is the same on any machine."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


class FakeClock:
    """Stands in for `time.perf_counter`.

    Args:
        seed: of the noise.
        noise: scatter of each advance, as a share: the sum of a run's advances scatters several times less.

    Attributes:
        pace: seconds that pass for each one told: 1.5 is a machine that is busy with something else.
        drift: by what share the pace grows with each second that passes, as on a machine that gets warm.
    """

    def __init__(self, seed: int = 0, noise: float = 0.01) -> None:
        self.pace = 1.0
        self.drift = 0.0
        self._now = 0.0
        self._noise = noise
        self._random = random.Random(seed)

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        pace = self.pace * (1 + self.drift * self._now)
        self._now += seconds * pace * math.exp(self._random.gauss(0, self._noise))


class RealClock:
    """Time that really passes: the caller keeps its core busy.

    `time.sleep` oversleeps by a good part of a step of a tiny model, gives the core away and lets its caches go cold:
    what comes after a sleep is slower too, and would be blamed for it.
    """

    def advance(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a forward takes: of itself, and for each of its tokens."""

    forward: float
    row: float


@contextmanager
def charged(clock: FakeClock, costs: dict[nn.Module, Cost]) -> Iterator[None]:
    """Let the forwards of models move the clock, whoever calls them."""

    def charge(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cost = costs[model]
        clock.advance(cost.forward + cost.row * kwargs["input_ids"].shape[1])

    handles = [model.register_forward_pre_hook(charge, with_kwargs=True) for model in costs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
