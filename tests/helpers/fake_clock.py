"""A clock that moves only on request, and models that move it: measured times are the same on any machine."""

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
    """A stand-in for `time.perf_counter`.

    Args:
        seed: of the noise.
        noise: relative scatter of each advance. The sum of a run's advances scatters several times less.

    Attributes:
        pace: seconds that pass for each requested second. 1.5 is a machine that is busy with something else.
        drift: relative growth of the pace per second, as on a machine that warms up.
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
    """A clock of real time: the caller keeps its core busy.

    `time.sleep` oversleeps by a good part of a tiny model's step, releases the core and lets its caches go cold. The
    work after a sleep is then slower too, and would be blamed for it.
    """

    def advance(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


@dataclass(frozen=True, slots=True)
class Cost:
    """The seconds of a forward: a fixed part, and a part for each token."""

    forward: float
    row: float


@contextmanager
def charged(clock: FakeClock, costs: dict[nn.Module, Cost]) -> Iterator[None]:
    """Let every forward of these models move the clock."""

    def charge(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cost = costs[model]
        clock.advance(cost.forward + cost.row * kwargs["input_ids"].shape[1])

    handles = [model.register_forward_pre_hook(charge, with_kwargs=True) for model in costs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
