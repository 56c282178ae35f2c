"""Intervals that are looked at after each repeat."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from specdecode.bench.runs.looks import tail_of_look
from specdecode.bench.runs.statistics import TAIL, typical_ratio
from tests.helpers.speed_runs import read_back, sweep


def test_all_looks_together_miss_as_often_as_they_may() -> None:
    """Guards against `--until` that finds a change of equal code by chance, and against intervals wider than the looks
    cost.
    """
    looks, walks = 20, 200_000
    bounds = np.array([NormalDist().inv_cdf(1 - tail_of_look(look)) for look in range(1, looks + 1)])
    chance, sums, inside = np.random.default_rng(0), np.zeros(walks), np.ones(walks, dtype=bool)
    for look, bound in enumerate(bounds, 1):
        sums += chance.normal(size=walks)
        inside &= sums / np.sqrt(look) < bound
        missed = 1 - inside.mean()
        # Of all that may be missed, the first k looks have the share k / (k + 4). The bounds lie on a grid.
        assert 0.92 < missed / (TAIL * look / (look + 4)) < 1.02


def test_a_spent_budget_leaves_nothing_unspent() -> None:
    """Guards against sessions that end early with an interval as wide as if they went on, and against a last look that
    spends twice.
    """
    walks = 200_000
    chance, sums, inside = np.random.default_rng(1), np.zeros(walks), np.ones(walks, dtype=bool)
    for look in range(1, 8):
        sums += chance.normal(size=walks)
        bound, last = (NormalDist().inv_cdf(1 - tail_of_look(look, ends)) for ends in (False, True))
        missed = 1 - (inside & (sums / np.sqrt(look) < last)).mean()
        assert 0.92 < missed / TAIL < 1.02, look
        inside &= sums / np.sqrt(look) < bound


def test_the_intervals_of_the_first_looks_are_about_as_wide() -> None:
    """Guards against a rule that makes long runs blind: each further look would cost more than its repeat brings."""
    widths = [NormalDist().inv_cdf(1 - tail_of_look(look)) for look in range(1, 13)]
    assert max(widths) < 1.12 * min(widths)


def test_more_looks_change_no_earlier_one() -> None:
    """Guards against a verdict that depends on what else was computed in the process."""
    first = tail_of_look(2)
    assert tail_of_look(50) < first
    assert tail_of_look(2) == first


@pytest.mark.parametrize(
    ("header", "tails"),
    [
        ({}, (TAIL, TAIL)),
        ({"until": 0.05}, (tail_of_look(2), tail_of_look(1))),
        ({"until": 0.05, "budget_spent": True}, (tail_of_look(2, last=True), tail_of_look(1))),
    ],
)
def test_a_run_file_tells_which_look_was_the_last(header: dict[str, Any], tails: tuple[float, float]) -> None:
    """Guards against an arm whose verdict was clear early, and that is judged again by a narrower interval."""
    run = sweep({"ar": {}, "early": {}}, **header)
    twice = {prompt: replace(row, logs=2 * [row.log_speedup]) for prompt, row in run.arms["ar"].rows.items()}
    run = read_back(replace(run, arms=run.arms | {"ar": replace(run.arms["ar"], rows=twice)}))
    assert (run.tail("ar"), run.tail("early")) == tails


@pytest.mark.parametrize("noise", ["normal", "disturbed"])
def test_looks_that_are_paid_for_convict_no_equal_code(noise: str) -> None:
    """Guards against `--until` that reports a change of equal code: frequent looks find one by chance, unless each look
    widens the interval.
    """
    chance = np.random.default_rng(5)

    def values() -> list[float]:
        logs = chance.normal(0, 0.05, 12)
        if noise == "disturbed":  # now and then something takes a processor for a while
            logs += chance.choice([0.0, 0.4, -0.4], 12, p=[0.8, 0.1, 0.1])
        return list(logs)

    paid, unpaid, sessions = 0, 0, 300
    for _ in range(sessions):
        logs: list[float] = []
        found_paid = found_unpaid = False
        for look in range(1, 11):
            logs += values()
            wide, narrow = typical_ratio(logs, tail=tail_of_look(look)), typical_ratio(logs)
            found_paid |= not wide.low <= 1 <= wide.high
            found_unpaid |= not narrow.low <= 1 <= narrow.high
        paid, unpaid = paid + found_paid, unpaid + found_unpaid
    assert paid / sessions <= 0.05
    assert unpaid / sessions > 0.1
