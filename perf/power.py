"""Simulate the gate's verdicts on recorded traces of real machines: `python -m perf.power TRACE...`."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from perf.traces import Trace
from specdecode.bench.arms.run import Run
from specdecode.bench.gate.verdicts import Tolerance, Verdict, time_judgement
from specdecode.bench.measure.block import parted
from specdecode.bench.measure.interleaved import Interleaver, SlicedRun
from specdecode.bench.measure.steady import Steady
from specdecode.bench.runs.counts import Counts
from specdecode.bench.runs.records import NOISE_OF_TWO
from specdecode.bench.runs.statistics import Estimate, mean_ratio, noise_floor, typical_ratio
from specdecode.cli.output import say

RUN = 10
"""Stretches of a trace in a run of `ar`: 40 tokens."""


class Machine:
    """A replay of a recorded machine: it works at the recorded speed. After the end of the trace it starts over.

    Args:
        trace: trace of the machine.
        seed: seed of the moment at which the replay begins.
    """

    def __init__(self, trace: Trace, seed: int) -> None:
        self._ends = [0.0, *np.cumsum(trace.seconds * trace.unit_s)]
        self._taken = [0.0, *np.cumsum(trace.taken * trace.seconds * trace.unit_s)]
        self._at = random.Random(seed).uniform(0, len(trace.seconds))

    def clock(self) -> float:
        """Return the seconds of work so far, counted from the start of the trace."""
        return self._sum(self._ends)

    def work(self, stretches: float) -> float:
        """Simulate the work of some stretches, and return its seconds."""
        started = self.clock()
        self._at += stretches
        return self.clock() - started

    def watch(self) -> Callable[[], float]:
        """Begin to measure the share of other work, as `support.disturbance.watch` does."""
        started, before = self.clock(), self._sum(self._taken)
        return lambda: (self._sum(self._taken) - before) / (self.clock() - started)

    def _sum(self, sums: list[float]) -> float:
        rounds, place = divmod(self._at, len(sums) - 1)
        whole = int(place)
        return rounds * sums[-1] + sums[whole] + (place - whole) * (sums[whole + 1] - sums[whole])


@dataclass(frozen=True, slots=True)
class Session:
    """The measurements of one arm in a simulated session.

    Attributes:
        logs: logarithms of the arm's speedups, one for each block.
        noise: logarithms of the baseline's speedups over itself.
    """

    logs: list[float]
    noise: list[float]


def session(machine: Machine, others: int, blocks: int, slower: float, again: float) -> Session:
    """Simulate a session of the suite: blocks of `ar`, the other arms in two parts, and `ar` between and after them.

    Args:
        machine: the replayed machine.
        others: number of other arms; the last one is the observed arm.
        blocks: number of blocks, prompts times repeats.
        slower: slowdown of the observed arm, as a share of its time.
        again: the most time for measuring disturbed runs again, as a share of the rest.
    """
    steady = Steady(bound=again, watch=machine.watch, clock=machine.clock)
    costs = [0.5 + 0.7 * arm / others for arm in range(others)]
    logs, noise = [], []

    def run(cost: float) -> float:
        return math.log(steady.measure(partial(machine.work, cost * RUN)).value)

    for block in range(blocks):
        order = random.Random(block).sample(range(others), others)
        beats, place, time = [run(1.0)], 0, 0.0
        for part in parted(order, 2):
            for arm in part:
                seen = run(costs[arm] * (1 + slower if arm == others - 1 else 1.0))
                if arm == others - 1:
                    place, time = len(beats), seen
            beats.append(run(1.0))
        logs.append((beats[place - 1] + beats[place]) / 2 - time)
        noise.append(beats[1] - (beats[0] + beats[2]) / 2 if len(beats) > 2 else NOISE_OF_TWO * (beats[0] - beats[1]))
    return Session(logs, noise)


Compared = tuple[list[float], float]
"""Logarithms of an arm's new speed over its old speed, and the A/A floor."""


def by_baseline(trace: Trace, seed: int, others: int, blocks: int, slower: float, again: float = 1.0) -> Compared:
    """Simulate a session and its baseline, which begin at different moments of the trace."""
    new = session(Machine(trace, 2 * seed), others, blocks, slower, again)
    old = session(Machine(trace, 2 * seed + 1), others, blocks, 0.0, again)
    floor = math.hypot(noise_floor(new.noise), noise_floor(old.noise))
    return [now - was for now, was in zip(new.logs, old.logs, strict=True)], floor


def side_by_side(trace: Trace, seed: int, others: int, blocks: int, slower: float, again: float = 1.0) -> Compared:
    """Simulate a side-by-side session of two versions. A slice of a run is one stretch."""
    machine = Machine(trace, seed)
    interleaver = Interleaver(Steady(bound=again, watch=machine.watch, clock=machine.clock))

    def run(cost: float) -> SlicedRun:
        seconds = [machine.work(cost)]
        while len(seconds) < RUN:
            yield
            seconds.append(machine.work(cost))
        return Run([0], sum(seconds), seconds[0], Counts(steps=1)), seconds

    logs, noise = [], []
    for block in range(blocks):
        for arm in range(others + 1):
            first, second = (
                interleaver.measure(lambda: (run(1 + slower), run(1.0)), new_first).log_ratio
                for new_first in (block % 2 == 0, block % 2 == 1)
            )
            if arm == others:
                logs.append((first + second) / 2)
                noise.append((first - second) / 2)
    return logs, noise_floor(noise)


def mean_of_all(logs: Sequence[float], floor: float) -> Estimate:
    """Estimate a change by the mean and its bootstrap, to compare with `typical_ratio`."""
    return mean_ratio([[log] for log in logs], floor)


STATISTICS: dict[str, Callable[[Sequence[float], float], Estimate]] = {"typical": typical_ratio, "mean": mean_of_all}


def verdict(change: Estimate, tolerance: float) -> Verdict:
    """Return the gate's verdict on a change."""
    return time_judgement("arm", "speed", change, Tolerance(tolerance)).verdict


KINDS = {
    "by a baseline, 14 other arms, 12 blocks": (by_baseline, 14, 12),
    "by a baseline, one arm, 60 blocks": (by_baseline, 1, 60),
    "side by side, one arm, 6 blocks": (side_by_side, 1, 6),
    "side by side, one arm, 24 blocks": (side_by_side, 1, 24),
}


def lines(trace: Trace, count: int, statistic: str, again: float) -> Iterator[str]:
    """Yield rows of a table: the coverage of the interval, its half-width, and how often the verdict is REGRESSED."""
    for name, (simulate, others, blocks) in KINDS.items():

        def changes(slower: float, simulate=simulate, others=others, blocks=blocks) -> list[Estimate]:
            compared = (simulate(trace, seed, others, blocks, slower, again) for seed in range(count))
            return [STATISTICS[statistic](logs, floor) for logs, floor in compared]

        equal = changes(0.0)
        covered = sum(change.low <= 1 <= change.high for change in equal) / count
        half = float(np.median([math.log(change.high / change.low) / 2 for change in equal]))
        false = sum(verdict(change, 0.02) is Verdict.REGRESSED for change in equal)
        cells = [f"{covered:.1%}", f"{half:.1%}", str(false)]
        for slower, tolerance in ((0.05, 0.02), (0.03, 0.01)):
            seen = sum(verdict(change, tolerance) is Verdict.REGRESSED for change in changes(slower))
            cells.append(f"{seen / count:.0%}")
        yield f"| {trace.about} | {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table of the verdicts on each trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path, nargs="+", help="recorded by python -m perf.traces")
    parser.add_argument("--count", type=int, default=1000, help="comparisons of each kind [1000]")
    parser.add_argument("--statistic", choices=STATISTICS, default="typical", help="estimate of a change [typical]")
    parser.add_argument("--once", action="store_true", help="measure no disturbed run again")
    options = parser.parse_args()
    columns = ("machine", "comparison", "covered", "half-width", "equal: REGRESSED", "5 %, tolerance 2 %", "3 %, 1 %")
    say("| " + " | ".join(columns) + " |\n|---|---|" + "--:|" * (len(columns) - 2))
    for file in options.traces:
        for line in lines(Trace.read(file), options.count, options.statistic, 0.0 if options.once else 1.0):
            say(line)


if __name__ == "__main__":
    main()
