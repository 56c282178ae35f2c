"""The choice of measurements to repeat."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from specdecode.bench.measure.steady import MOST_TRIES, Steady
from tests.helpers.fake_clock import FakeClock


class Machine:
    """A machine on which other work takes the listed shares, one for each try. Each try takes a second."""

    def __init__(self, *shares: float) -> None:
        self.clock, self.tries = FakeClock(noise=0.0), 0
        given = iter(shares)
        self.rule = Steady(watch=lambda: lambda: next(given), clock=self.clock)

    def once(self) -> int:
        self.clock.advance(1.0)
        self.tries += 1
        return self.tries


def test_a_quiet_machine_measures_once() -> None:
    """Guards against time spent on needless repeats."""
    machine = Machine(*[0.01] * 5)
    rule = machine.rule
    assert [rule.measure(machine.once).tries for _ in range(5)] == [1] * 5
    assert rule.again_s == 0.0


def test_the_least_disturbed_try_is_kept() -> None:
    """Guards against keeping the fastest or the last try instead of the least disturbed one."""
    machine = Machine(0, 0, 0, 0, 0.5, 0.1, 0.3, 0.2, 0.4, 0.01)
    rule = machine.rule
    for _ in range(4):
        rule.measure(machine.once)
    worst = rule.measure(machine.once)
    assert (worst.value, worst.tries, worst.disturbed) == (6, MOST_TRIES, True)
    kept = rule.measure(machine.once)
    assert (kept.value, kept.tries, kept.disturbed) == (10, 2, False)
    assert rule.again_s == 4.0


def test_what_others_always_take_disturbs_nothing() -> None:
    """Guards against endless repeats on a machine that is always half busy."""
    machine = Machine(*[0.5] * 200)
    rule = machine.rule
    kept = [rule.measure(machine.once) for _ in range(50)]
    assert [one.tries for one in kept[-30:]] == [1] * 30
    assert rule.again_s <= rule.first_s


def test_the_time_is_bounded() -> None:
    """Guards against a run that never ends beside other work."""
    machine = Machine(*[share for _ in range(200) for share in (0.0, 0.4, 0.6, 0.8)])
    rule = machine.rule
    for _ in range(100):
        rule.measure(machine.once)
    assert 0 < rule.again_s <= rule.first_s == 100.0


@pytest.mark.parametrize("shares", [[0.0, 0.3, 0.0] * 20])
def test_the_rule_does_not_look_at_times(shares: list[float]) -> None:
    """Guards against an arm that is measured again because it was slow."""

    def tries(seconds: Iterator[float]) -> list[int]:
        machine = Machine(*shares)
        return [machine.rule.measure(lambda: machine.clock.advance(next(seconds))).tries for _ in range(20)]

    assert tries(iter([1.0] * 60)) == tries(iter([1.0, 1.0, 1.5] * 20))
