"""Count the verdicts of the fixture `paired` on equal functions and on a planted slowdown: `python -m perf.paired`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

from perf.neighbour import neighbour
from perf.verdicts import verdict_table
from specdecode.bench.gate.verdicts import AGAINST_TOLERANCE
from specdecode.bench.measure.paired import SECONDS, TimedFunction, measure_paired, timer
from specdecode.cli.output import say

LOOPS = 2000
"""Rounds of the timed function, which take some tens of microseconds."""


def work(loops: int) -> Callable[[], int]:
    """Return a function that does `loops` rounds."""

    def run() -> int:
        total = 0
        for number in range(loops):
            total += number
        return total

    return run


def main() -> None:
    """Print a line for each run, and a table of the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="runs of each kind [20]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds of each run [{SECONDS:g}]")
    parser.add_argument("--slowdown", type=float, default=0.05, help="planted slowdown, as a share [0.05]")
    parser.add_argument("--neighbour", action="store_true", help="another process uses a core a fifth of the time")
    options = parser.parse_args()
    with neighbour(options.neighbour):
        _print(options)


def _print(options: argparse.Namespace) -> None:
    verdicts: dict[str, Counter[str]] = {}
    kinds = {"equal": LOOPS, f"{options.slowdown:.0%} slower": round(LOOPS * (1 + options.slowdown))}
    for run in range(options.runs):
        for kind, loops in kinds.items():
            new, old = (
                TimedFunction(name, None, timer(work(count))) for name, count in (("new", loops), ("old", LOOPS))
            )
            paired = measure_paired(kind, new, old, options.seconds)
            (judged,) = paired.judge(AGAINST_TOLERANCE)
            say(f"{run + 1}/{options.runs} {kind}: {judged.verdict.value}: {judged.reason}")
            verdicts.setdefault(kind, Counter())[judged.verdict.value] += 1
    say("\n" + verdict_table("new function", verdicts))


if __name__ == "__main__":
    main()
