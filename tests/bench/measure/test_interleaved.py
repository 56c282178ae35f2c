"""Two versions whose runs take turns, slice by slice."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.interleaved import Interleaver, SlicedRun
from specdecode.bench.measure.steady import Steady
from specdecode.bench.runs.counts import Counts
from tests.helpers.fake_clock import FakeClock


class Machine:
    """A machine on which other work takes the listed shares, one for each turn of both versions; then none.

    Attributes:
        log: the versions, in the order of their slices.
    """

    def __init__(self, *shares: float) -> None:
        self.log: list[str] = []
        given = iter(shares)
        clock = FakeClock(noise=0.0)
        self.steady = Steady(watch=lambda: lambda: next(given, 0.0), clock=clock)
        self.interleaver = Interleaver(self.steady)
        self.clock = clock

    def run(self, name: str, *seconds: float) -> SlicedRun:
        """Return a run whose slices take these seconds."""
        for place, slice_s in enumerate(seconds):
            if place:
                yield
            self.log.append(name)
            self.clock.advance(slice_s)
        return Run([1] * len(seconds), sum(seconds), seconds[0], Counts(steps=len(seconds))), list(seconds)

    def failing(self, name: str) -> SlicedRun:
        self.log.append(name)
        yield
        raise ArmError("it broke")


def test_versions_take_turns_step_by_step() -> None:
    """Guards against a version that always goes first, and against whole runs one after the other."""
    machine = Machine()
    pair = machine.interleaver.measure(lambda: (machine.run("new", 2, 1, 1), machine.run("old", 2, 2, 2)), True)
    assert machine.log == ["new", "old", "old", "new", "new", "old"]
    assert pair.log_ratio == pytest.approx(math.log(6 / 4))
    assert (pair.new.slices, pair.old.left_out) == (3, 0)
    machine.interleaver.measure(lambda: (machine.run("new", 1), machine.run("old", 1)), False)
    assert machine.log[6:] == ["old", "new"]


def test_a_disturbed_slice_counts_for_neither_version() -> None:
    """Guards against a burst of other work, long enough for one version's slice, that decides a verdict."""
    machine = Machine(0.0, 0.3, 0.0)
    pair = machine.interleaver.measure(lambda: (machine.run("new", 1, 5, 1), machine.run("old", 1, 2, 1)), True)
    assert pair.log_ratio == 0.0
    assert (pair.new.slices, pair.old.left_out) == (3, 1)
    assert pair.new.total_s == 7.0  # the table's times are those of the whole run
    assert (pair.new.tries, pair.new.disturbed) == (1, False)


def test_what_others_always_take_disturbs_no_slice() -> None:
    """Guards against a shared machine on which no slice is ever compared."""
    machine = Machine(*[0.5] * 60)
    for _ in range(20):
        pair = machine.interleaver.measure(lambda: (machine.run("new", 1, 1, 1), machine.run("old", 1, 1, 1)), True)
    assert (pair.new.left_out, pair.new.tries) == (0, 1)


def test_a_pair_whose_slices_are_mostly_disturbed_is_measured_again() -> None:
    """Guards against a verdict from the few slices that are left, and against keeping the last try instead of the least
    disturbed one.
    """
    machine = Machine(0, 0, 0, 0.4, 0.4, 0.0, 0.2, 0.2, 0.0, 0.3, 0.3, 0.0, 0.4, 0.4, 0.0)
    number: Iterator[int] = iter(range(10))

    def start() -> tuple[SlicedRun, SlicedRun]:
        slow = next(number) + 1.0
        return machine.run("new", slow, slow, slow), machine.run("old", 1, 1, 1)

    machine.interleaver.measure(start, True)
    machine.steady.bound = machine.interleaver._slices._runs.bound = 10.0
    pair = machine.interleaver.measure(start, True)
    assert (pair.new.tries, pair.new.disturbed) == (4, True)
    assert pair.new.total_s == 9.0
    assert pair.log_ratio == pytest.approx(-math.log(3))  # all slices, as most are disturbed


def test_other_steps_are_compared_as_whole_runs() -> None:
    """Guards against comparing the third slice of one version with another part of the text in the other."""
    machine = Machine(0.0, 0.3, 0.0)
    pair = machine.interleaver.measure(lambda: (machine.run("new", 1, 1), machine.run("old", 1, 1, 2)), True)
    assert pair.log_ratio == pytest.approx(math.log(4 / 2))
    assert (pair.new.slices, pair.old.slices) == (0, 0)


def test_a_failure_leaves_no_version_waiting() -> None:
    """Guards against a worker that waits for its next turn for ever, and takes the next request for that."""
    machine = Machine()
    with pytest.raises(ArmError, match="it broke"):
        machine.interleaver.measure(lambda: (machine.failing("new"), machine.run("old", 1, 1, 1)), True)
    assert machine.log.count("old") == 3
