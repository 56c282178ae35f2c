"""Compare plain decoding below callers of different depth, with and without room on the call stack.

The command is `python -m perf.call_stack`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from specdecode import generate, load
from specdecode.cli.output import say

TOKENS = 8
"""Tokens of each timed text."""

DEPTHS = range(140)
"""Depths of the caller that are tried: one chunk of Python's stack holds fewer of its frames."""


def below(depth: int, call: Callable[[], Any]) -> Any:
    """Call a function below `depth` further frames."""
    return call() if depth == 0 else below(depth - 1, call)


def page_faults(call: Callable[[], Any]) -> int:
    """Return the number of memory pages that this process had to get from the system during a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Print page faults and times at the best depth and at the worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2-135m", help="model that decodes [smollm2-135m]")
    parser.add_argument("--rounds", type=int, default=30, help="timed texts of each kind [30]")
    options = parser.parse_args()
    target = load(options.target)
    prompt = target.encode("def add(a, b):\n")
    without = generate.__wrapped__  # type: ignore[attr-defined]
    calls: dict[str, Callable[[], Any]] = {
        "with room": lambda: generate(target, prompt, max_new_tokens=TOKENS),
        "without": lambda: without(target, prompt, max_new_tokens=TOKENS),
    }
    faults: list[int] = []
    for depth in DEPTHS:
        faults.append(below(depth, partial(page_faults, lambda: without(target, prompt, max_new_tokens=1))))
    depths = (0, faults.index(max(faults)))
    taken: dict[tuple[str, int], list[float]] = {(name, depth): [] for name in calls for depth in depths}
    for _ in range(options.rounds):
        for (name, depth), times in taken.items():
            times.append(below(depth, partial(seconds, calls[name])))
    say(
        "| decoding | frames of the caller | page faults a token | time over that of the first row |\n|---|---|--:|--:|"
    )
    for (name, depth), times in taken.items():
        a_token = below(depth, partial(page_faults, calls[name])) / TOKENS
        ratios = [seconds_with / usual for seconds_with, usual in zip(times, taken["with room", 0], strict=True)]
        say(f"| {name} | {depth} | {a_token:.0f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
