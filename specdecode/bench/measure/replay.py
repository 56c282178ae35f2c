"""Measured durations, played to pytest-benchmark on a virtual clock: its tables and files, our experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_now = 0.0


def clock() -> float:
    """The timer of replayed benchmarks, in seconds: it moves only when a duration is played."""
    return _now


def replay(benchmark: Any, durations: Sequence[float]) -> None:
    """Make each duration a round of the given `benchmark` fixture, whose timer must be `clock`."""
    ahead = iter(durations)

    def play() -> None:
        global _now
        _now += next(ahead)

    benchmark.pedantic(play, rounds=len(durations), iterations=1)
