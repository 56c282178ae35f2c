"""The time limit of a run, and the choice of arms to measure."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from specdecode.bench.measure.until import Until, rounds
from tests.helpers.fake_clock import FakeClock

ARMS = ["ar", "a", "b"]


def planned(repeats: int, *answers: set[str], budget_s: float = 100.0) -> list[tuple[str, int, Collection[str]]]:
    """Return the measured places for two prompts of ten seconds each, if each look finds these arms open."""
    clock, given, seen = FakeClock(noise=0.0), iter(answers), []
    until = Until(budget_s, lambda measured: next(given, set()), clock, started=0.0)
    for place in rounds(object(), ["p", "q"], repeats, ARMS, until):
        seen.append(place)
        clock.advance(10.0)
    return seen


@pytest.mark.parametrize("repeats", [1, 3])
def test_without_it_the_repeats_are_fixed(repeats: int) -> None:
    """Guards against a run that continues without a request for more repeats."""
    assert list(rounds(object(), ["p", "q"], repeats, ARMS)) == [
        (prompt, repeat, ARMS) for repeat in range(repeats) for prompt in "pq"
    ]


def test_what_is_clear_is_not_measured_again() -> None:
    """Guards against time spent on arms with a clear verdict, and against a run that ends while an arm is open."""
    assert planned(1, {"a", "b"}, {"b"}) == [
        *[(prompt, 0, ARMS) for prompt in "pq"],
        *[(prompt, 1, {"a", "b"}) for prompt in "pq"],
        *[(prompt, 2, {"b"}) for prompt in "pq"],
    ]
    assert len(planned(2)) == 4


def test_the_time_is_bounded() -> None:
    """Guards against a run without end for an arm that stays open, and against a run without any measurement."""
    endless = [{"a"}] * 100
    assert len(planned(1, *endless, budget_s=55.0)) == 6
    assert len(planned(1, *endless, budget_s=5.0)) == 1


@pytest.mark.parametrize(("budget_s", "spent"), [(25.0, True), (45.0, True), (1e9, False)])
def test_a_spent_budget_is_noted(budget_s: float, spent: bool) -> None:
    """Guards against a last look that is taken for one of many, and against one that ends because all is clear."""
    clock, given = FakeClock(noise=0.0), iter([{"a"}, set()])
    until = Until(budget_s, lambda measured: next(given), clock, started=0.0)
    for _ in rounds(object(), ["p", "q"], 1, ARMS, until):
        clock.advance(20.0)
    assert until.budget_spent is spent
