"""Simulate the gate's verdicts on recorded traces of real machines: `python -m perf.power TRACE...`."""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
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
from specdecode.bench.runs.looks import tail_of_look
from specdecode.bench.runs.statistics import (
    NOISE_OF_TWO,
    Estimate,
    detectable_slowdown,
    mean_ratio,
    noise_floor,
    typical_ratio,
)
from specdecode.cli.output import say

RUN, SHORT_RUN = 10, 4
"""Stretches of a trace in a run of `ar`: 40 tokens, and 16 tokens, as in a session of `perf.trials`."""

PROMPTS = 12
"""Prompts of a session with `--until`."""

BUDGET_MINUTES = 10.0
"""The minutes after which such a session ends."""


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


class Session:
    """A simulated session of the suite: blocks of `ar`, the other arms in two parts, and `ar` between and after them.

    Args:
        machine: the replayed machine.
        others: number of other arms; the last one is the observed arm.
        slower: slowdown of the observed arm, as a share of its time.
        again: the most time for measuring disturbed runs again, as a share of the rest.

    Attributes:
        logs: logarithms of the observed arm's speedups, one for each block.
        noise: logarithms of the reference arm's speedups over itself.
    """

    def __init__(self, machine: Machine, others: int, slower: float, again: float) -> None:
        self.logs: list[float] = []
        self.noise: list[float] = []
        self._machine = machine
        self._pauses = random.Random(machine.clock())
        self._steady = Steady(bound=again, watch=machine.watch, clock=machine.clock)
        self._costs = [0.5 + 0.7 * arm / others for arm in range(others)]
        self._costs[-1] *= 1 + slower

    def measure(self, blocks: int) -> None:
        """Simulate further blocks."""
        for _ in range(blocks):
            self._block()

    def _block(self) -> None:
        # As prompts differ, so do the seconds between blocks. Without this, all blocks of a session would begin at the
        # same place of the recorded texts, and what slows that place would not average out.
        self._machine.work(self._pauses.uniform(0, RUN))
        others = len(self._costs)
        order = random.Random(len(self.logs)).sample(range(others), others)
        beats, place, time = [self._log_s(1.0)], 0, 0.0
        for part in parted(order, 2):
            for arm in part:
                seen = self._log_s(self._costs[arm])
                if arm == others - 1:
                    place, time = len(beats), seen
            beats.append(self._log_s(1.0))
        self.logs.append((beats[place - 1] + beats[place]) / 2 - time)
        self.noise.append(
            beats[1] - (beats[0] + beats[2]) / 2 if len(beats) > 2 else NOISE_OF_TWO * (beats[0] - beats[1])
        )

    def _log_s(self, cost: float) -> float:
        return math.log(self._steady.measure(partial(self._machine.work, cost * RUN)).value)


class SessionInTurns:
    """A simulated session with `--until`: blocks of `ar` and one arm, each of which takes turns with plain decoding.

    Args:
        machine: the replayed machine.
        slower: slowdown of the arm, as a share of its time.
        again: the most time for measuring disturbed runs again, as a share of the rest.

    Attributes:
        logs, noise: as of `Session`.
    """

    def __init__(self, machine: Machine, slower: float, again: float) -> None:
        self.logs: list[float] = []
        self.noise: list[float] = []
        self._machine, self._cost, self._started = machine, 1 + slower, machine.clock()
        self._pauses = random.Random(self._started)
        self._interleaver = Interleaver(Steady(bound=again, watch=machine.watch, clock=machine.clock))

    @property
    def minutes(self) -> float:
        """The minutes since the session began."""
        return (self._machine.clock() - self._started) / 60

    def measure(self) -> None:
        """Simulate a block of each prompt."""
        for _ in range(PROMPTS):
            self._machine.work(self._pauses.uniform(0, RUN))
            self.noise.append(self._log_speedup(1.0))
            self.logs.append(self._log_speedup(self._cost))

    def _log_speedup(self, cost: float) -> float:
        def start() -> tuple[SlicedRun, SlicedRun]:
            return sliced(self._machine, cost, SHORT_RUN), sliced(self._machine, 1.0, SHORT_RUN)

        return self._interleaver.measure(start, True).log_ratio


def sliced(machine: Machine, cost: float, stretches: int) -> SlicedRun:
    """Return a run of some stretches that waits after each of them."""
    seconds = [machine.work(cost)]
    while len(seconds) < stretches:
        yield
        seconds.append(machine.work(cost))
    return Run([0], sum(seconds), seconds[0], Counts(steps=1)), seconds


Compared = tuple[list[float], float]
"""Logarithms of an arm's new speed over its old speed, and the A/A floor."""


def by_baseline(trace: Trace, seed: int, others: int, blocks: int, slower: float, again: float = 1.0) -> Compared:
    """Simulate a session and its baseline, which begin at different moments of the trace."""
    new = Session(Machine(trace, 2 * seed), others, slower, again)
    old = Session(Machine(trace, 2 * seed + 1), others, 0.0, again)
    new.measure(blocks)
    old.measure(blocks)
    return [now - was for now, was in zip(new.logs, old.logs, strict=True)], _floor(new, old)


def _floor(new: Session | SessionInTurns, old: Session | SessionInTurns) -> float:
    return math.hypot(noise_floor(new.noise), noise_floor(old.noise))


def until_decided(
    trace: Trace, seed: int, slower: float, aim: float, tolerance: float, again: float = 1.0
) -> tuple[Verdict, float]:
    """Simulate `--until` with one arm, by a baseline that was measured until its noise hides half of the aim.

    Returns:
        The verdict, and the minutes of the session.
    """
    new = SessionInTurns(Machine(trace, 2 * seed), slower, again)
    old = SessionInTurns(Machine(trace, 2 * seed + 1), 0.0, again)
    while old.minutes < BUDGET_MINUTES:
        old.measure()
        floor = noise_floor(old.noise)
        if detectable_slowdown(Estimate(1.0, math.exp(-floor), math.exp(floor)), tolerance) <= aim / 2:
            break
    for look in itertools.count(1):
        new.measure()
        repeats = min(look, len(old.logs) // PROMPTS)
        now, was = (_averaged(session.logs, repeats) for session in (new, old))
        last = new.minutes > BUDGET_MINUTES
        change = typical_ratio(now - was, _floor(new, old), tail_of_look(look, last))
        result = verdict(change, tolerance)
        decided = result is not Verdict.INCONCLUSIVE or detectable_slowdown(change, tolerance) <= aim
        if decided or last:
            break
    return result, new.minutes


def _averaged(logs: Sequence[float], repeats: int) -> np.ndarray:
    """Return logarithms of each prompt, with repeats averaged down to a number, as `RunFile.changes` does."""
    by_repeat = np.reshape(logs, (-1, PROMPTS))
    return np.concatenate([part.mean(axis=0) for part in np.array_split(by_repeat, repeats)])


def side_by_side(trace: Trace, seed: int, others: int, blocks: int, slower: float, again: float = 1.0) -> Compared:
    """Simulate a side-by-side session of two versions. A slice of a run is one stretch."""
    machine = Machine(trace, seed)
    interleaver = Interleaver(Steady(bound=again, watch=machine.watch, clock=machine.clock))

    def run(cost: float) -> SlicedRun:
        return sliced(machine, cost, RUN)

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


STATISTICS: dict[str, Callable[[Sequence[float], float], Estimate]] = {
    "typical": typical_ratio,
    "mean": lambda logs, floor: mean_ratio([[log] for log in logs], floor),
}


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


def until_lines(trace: Trace, count: int, again: float) -> Iterator[str]:
    """Yield rows of a table: the verdicts of sessions that go on until they are decided, and their minutes."""
    for slower, aim, tolerance in ((0.0, 0.05, 0.02), (0.05, 0.05, 0.02), (0.0, 0.03, 0.01), (0.03, 0.03, 0.01)):
        verdicts, minutes = zip(
            *(until_decided(trace, seed, slower, aim, tolerance, again) for seed in range(count)), strict=True
        )
        shares = [
            f"{verdicts.count(one) / count:.1%}" for one in (Verdict.REGRESSED, Verdict.INCONCLUSIVE, Verdict.PASS)
        ]
        code = f"{slower:.0%} slower" if slower else "equal"
        cells = [trace.about, code, f"{aim:.0%}", f"{tolerance:.0%}", *shares, f"{np.median(minutes):.1f}"]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table of the verdicts on each trace, after a number of blocks, and one of sessions with `--until`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path, nargs="+", help="recorded by python -m perf.traces")
    parser.add_argument("--count", type=int, default=1000, help="comparisons of each kind [1000]")
    parser.add_argument("--statistic", choices=STATISTICS, default="typical", help="estimate of a change [typical]")
    parser.add_argument("--once", action="store_true", help="measure no disturbed run again")
    options = parser.parse_args()
    again = 0.0 if options.once else 1.0
    traces = [Trace.read(file) for file in options.traces]
    columns = ("machine", "comparison", "covered", "half-width", "equal: REGRESSED", "5 %, tolerance 2 %", "3 %, 1 %")
    say("| " + " | ".join(columns) + " |\n|---|---|" + "--:|" * (len(columns) - 2))
    for trace in traces:
        for line in lines(trace, options.count, options.statistic, again):
            say(line)
    columns = ("machine", "code", "--until", "tolerance", "REGRESSED", "INCONCLUSIVE", "PASS", "minutes")
    say("\n| " + " | ".join(columns) + " |\n|---|---|" + "--:|" * (len(columns) - 2))
    for trace in traces:
        for line in until_lines(trace, options.count, again):
            say(line)


if __name__ == "__main__":
    main()
