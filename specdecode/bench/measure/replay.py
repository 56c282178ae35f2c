"""Replay of measured durations on a virtual clock, so that pytest-benchmark shows and stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_now = 0.0


def clock() -> float:
    """Return the virtual time in seconds. It advances only when a duration is replayed."""
    return _now


def replay(benchmark: Any, durations: Sequence[float]) -> None:
    """Replay each duration as a round of the `benchmark` fixture. The fixture's timer must be `clock`."""
    ahead = iter(durations)

    def play() -> None:
        global _now
        _now += next(ahead)

    benchmark.pedantic(play, rounds=len(durations), iterations=1)
