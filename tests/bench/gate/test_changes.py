"""Series of known content: how often a change is found where there is none, and where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from specdecode.bench.gate import changes
from specdecode.bench.gate.changes import LEVEL, Change, find_changes

NOISE = 0.01
Noise = Callable[[np.random.Generator, int], np.ndarray]


def normal(chance: np.random.Generator, count: int) -> np.ndarray:
    return chance.normal(0.0, NOISE, count)


def outliers(chance: np.random.Generator, count: int) -> np.ndarray:
    """Return noise without a variance: one run in ten is far off."""
    return NOISE * chance.standard_t(2, count)


def drift(count: int, first: int, last: int, each: float) -> np.ndarray:
    """Return a loss at each version from the first to the last."""
    return each * np.clip(np.arange(count) - first + 1, 0, last - first + 1)


def found(signal: np.ndarray, series: int, noise: Noise = normal, arms: int = 1) -> list[list[Change]]:
    """Return the changes found in each of so many series of signal and noise. Half of the permutations is enough, but
    not for short series, whose probabilities come close to the level.
    """
    chance = np.random.default_rng(22)
    with pytest.MonkeyPatch.context() as patch:
        if len(signal) > 10:
            patch.setattr(changes, "_MOST_BATCHES", changes._MOST_BATCHES // 2)
        return [find_changes(signal + noise(chance, len(signal)), LEVEL / arms) for _ in range(series)]


@pytest.mark.parametrize("noise", [normal, outliers])
@pytest.mark.parametrize("count", [6, 12, 30])
def test_false_alarms_are_as_rare_as_is_told(noise: Noise, count: int) -> None:
    """Guards against more false alarms than stated, because the search tries so many shapes that one fits the noise."""
    alarms = sum(map(bool, found(np.zeros(count), 300, noise)))
    most = 300 * LEVEL + 3 * math.sqrt(300 * LEVEL * (1 - LEVEL))
    assert alarms <= most


@pytest.mark.parametrize(
    ("signal", "first", "last"),
    [
        (drift(20, 12, 12, -0.04), 12, 12),
        (drift(20, 5, 12, -0.01), 5, 12),
        (drift(9, 1, 8, -0.01), 1, 8),
        (drift(30, 22, 29, -0.01), 22, 29),
    ],
    ids=["a step", "a drift", "all a drift", "a drift that goes on"],
)
def test_a_slowdown_is_found_where_it_is(signal: np.ndarray, first: int, last: int) -> None:
    """Guards against real slowdowns that are not found, or that are blamed on other versions or given a wrong size.

    There are twelve arms. The noise is as large as each loss of a drift, and a quarter of the step.
    """
    all_found = found(signal, 60, arms=12)
    alone = [one[0] for one in all_found if len(one) == 1]
    assert len(alone) >= 54
    right = [c for c in alone if abs(c.start + 1 - first) <= 3 and abs(c.end - last) <= 3]
    assert len(right) >= 51
    assert all(change.slower and change.p <= LEVEL for change in right)
    size = math.exp(signal[-1])
    assert np.mean([change.ratio.value for change in right]) == pytest.approx(size, abs=0.01)
    covered = [change for change in right if change.ratio.low <= size <= change.ratio.high]
    assert len(covered) >= 0.85 * len(right)  # the changes that were found are larger by chance


@pytest.mark.parametrize("loss", [-0.1, -0.04])
def test_a_gain_does_not_hide_the_loss_behind_it(loss: float) -> None:
    """Guards against a loss that stays hidden because the search looks for one step alone and an earlier gain cancels
    it.
    """
    signal = drift(30, 10, 10, 0.1) + drift(30, 20, 20, loss)
    right = 0
    for gain, *losses in found(signal, 20, arms=12):
        assert gain.start + 3 >= gain.end == 10
        assert not gain.slower
        right += [change.start < 20 <= change.end + 3 for change in losses if change.slower] == [True]
    assert right >= 18


def test_what_is_found_does_not_depend_on_chance() -> None:
    """Guards against a gate that fails, and passes when it is started again."""
    signal = drift(16, 5, 12, -0.006)
    assert found(signal, 5) == found(signal, 5)


@pytest.mark.parametrize("logs", [[0.0] * 20, [1e-12 * i for i in range(20)], [0.0, -0.5, -1.0]])
def test_rounding_and_short_series_are_no_change(logs: list[float]) -> None:
    """Guards against alarms about rounding differences, and against alarms from only three versions."""
    assert find_changes(logs) == []
