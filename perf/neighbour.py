"""A program of known load beside a measurement."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def neighbour(wanted: bool = True, seed: int = 0) -> Iterator[None]:
    """Run a process within the context that uses one core for 0.5 to 2 seconds at random, a fifth of the time."""
    other = multiprocessing.Process(target=_take_a_core, args=(seed,), daemon=True)
    if wanted:
        other.start()
    try:
        yield
    finally:
        if wanted:
            other.kill()
            other.join()


def _take_a_core(seed: int) -> None:
    chance = random.Random(seed)
    while True:
        busy = chance.uniform(0.5, 2.0)
        time.sleep(busy * chance.uniform(2.0, 6.0))
        end = time.monotonic() + busy
        while time.monotonic() < end:
            pass
