"""Two functions timed alternately, on a clock that moves only when they run."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import pytest

from specdecode.bench.gate.verdicts import Verdict
from specdecode.bench.measure.paired import LEAST_BLOCKS, Paired, PairedBlock, TimedFunction, measure_paired, timer
from tests.helpers.fake_clock import FakeClock


class Machine:
    """A clock, and functions that move it.

    Attributes:
        calls: the names of the called functions, in order.
        collecting: whether garbage collection was on in each call.
    """

    def __init__(self, noise: float = 0.01) -> None:
        self.clock = FakeClock(noise=noise)
        self.calls: list[str] = []
        self.collecting: list[bool] = []

    def function(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.collecting.append(gc.isenabled())
            self.clock.advance(seconds)

        return run

    def measure(self, new: float, old: float, seconds: float) -> Paired:
        sides = [
            TimedFunction(name, None, timer(self.function(name, s), self.clock)) for name, s in (("n", new), ("o", old))
        ]
        return measure_paired("test", *sides, seconds, self.clock)


def test_functions_take_turns() -> None:
    """Guards against one function that always runs first, and against measuring that ends before its time is over."""
    machine = Machine(noise=0.0)
    paired = machine.measure(0.5, 0.5, seconds=30.0)
    assert paired.loops == (1, 1)
    assert len(paired.blocks) == 15
    trial, turns = machine.calls[:2], machine.calls[2:]
    assert trial == ["n", "o"]
    assert "".join(turns) == ("noon" + "onno") * 7 + "noon"
    assert not any(machine.collecting[2:])
    assert gc.isenabled()


def test_slow_functions_are_timed_often_enough() -> None:
    """Guards against a time limit that leaves too few blocks for an interval."""
    paired = Machine().measure(10.0, 10.0, seconds=1.0)
    assert len(paired.blocks) == LEAST_BLOCKS
    assert paired.change.bounded


def test_fast_functions_are_called_often_enough() -> None:
    """Guards against times of only a few ticks of the clock."""
    paired = Machine().measure(1e-5, 4e-5, seconds=0.5)
    assert paired.loops == (pytest.approx(200, rel=0.05), pytest.approx(50, rel=0.05))
    assert paired.new_s[0] == pytest.approx(1e-5, rel=0.05)
    assert paired.old_s[0] == pytest.approx(4e-5, rel=0.05)
    assert paired.change.low < 4.0 < paired.change.high


def test_functions_that_take_about_as_long_are_called_as_often() -> None:
    """Guards against unequal numbers of calls, with which a busy neighbour disturbs the longer measurement more."""
    first, second = Machine(noise=0.1).measure(1.5e-5, 1e-5, seconds=0.5).loops
    assert first == second


@pytest.mark.parametrize(
    ("new", "verdict"),
    [(1.0, Verdict.PASS), (1.05, Verdict.REGRESSED), (0.9, Verdict.IMPROVED), (1.02, Verdict.INCONCLUSIVE)],
)
def test_times_are_judged(new: float, verdict: Verdict) -> None:
    """Guards against a verdict on the old function instead of the new one."""
    paired = Machine(noise=0.02).measure(new * 0.01, 0.01, seconds=5.0)
    (judged,) = paired.judge(0.02)
    assert judged.verdict is verdict, judged.reason
    assert "tolerance 2%" in judged.reason


def test_a_drift_is_no_change() -> None:
    """Guards against a machine that slows down reported as a slower function, or as noise."""
    block = PairedBlock((math.exp(0.0), math.exp(0.3)), (math.exp(0.1), math.exp(0.2)), new_first=True)
    assert block.log_ratio == pytest.approx(0.0)
    assert block.noise == pytest.approx(0.0)
    block = PairedBlock((math.exp(0.1), math.exp(0.2)), (math.exp(0.0), math.exp(0.3)), new_first=False)
    assert block.log_ratio == pytest.approx(0.0)
    assert block.noise == pytest.approx(0.0)
    assert PairedBlock((1.0, 1.0), (2.0, 2.0), new_first=True).log_ratio == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("new", "old", "verdict", "reason"),
    [
        ({"calls": 10.0}, {"calls": 10.0}, Verdict.PASS, "1 counters within 2%"),
        ({"calls": 12.0, "b": 1.0}, {"calls": 10.0, "b": 2.0}, Verdict.REGRESSED, "calls 10 -> 12; better: b 2 -> 1"),
        ({"calls": 8.0}, {"calls": 10.0}, Verdict.IMPROVED, "calls 10 -> 8"),
        ({"new": 8.0}, {"calls": 10.0}, Verdict.MISSING, "new lacks calls"),
    ],
)  # fmt: skip
def test_counters_are_judged(new: dict[str, float], old: dict[str, float], verdict: Verdict, reason: str) -> None:
    """Guards against more work that passes because the machine is faster."""
    sides = (TimedFunction(name, None, lambda loops: 1.0, counts) for name, counts in (("new", new), ("old", old)))
    paired = Paired("test", *sides, (1, 1), [PairedBlock((1.0, 1.0), (1.0, 1.0), new_first=True)] * 6)
    _, judged = paired.judge(0.02)
    assert (judged.verdict, judged.reason, judged.gate) == (verdict, reason, "counters")
