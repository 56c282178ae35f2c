"""The number of baseline runs between the arms."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from specdecode.bench.measure.drift import Drift

NOISE = 0.01


def parts_chosen(walk: float, seed: int) -> float:
    """Return the mean number of parts of a block, on a machine with 1 % noise per run and this drift within a block."""
    chance, drift, chosen = np.random.default_rng(seed), Drift(), []
    for _ in range(120):
        runs = chance.normal(0, NOISE, drift.parts + 1)
        runs += np.cumsum(np.concatenate([[0.0], chance.normal(0, walk / drift.parts**0.5, drift.parts)]))
        middle = len(runs) // 2
        drift.add(runs[0] - runs[-1], runs[middle] - (runs[middle - 1] + runs[middle + 1]) / 2)
        chosen.append(drift.parts)
    return statistics.fmean(chosen[12:])


@pytest.mark.parametrize(
    ("walk", "least", "most"), [(0.0, 2.0, 3.0), (0.01, 2.0, 3.5), (0.03, 3.0, 7.0), (0.1, 6.0, 8.0)]
)
def test_a_drift_asks_for_as_many_runs_as_keep_it_below_the_noise(walk: float, least: float, most: float) -> None:
    """Guards against arms compared with a baseline of a minute ago while the machine warms up, and against time spent
    on the baseline where there is no drift.
    """
    assert least <= statistics.fmean(parts_chosen(walk, seed) for seed in range(10)) <= most


def test_a_machine_without_noise_asks_for_none() -> None:
    """Guards against a division by zero noise."""
    drift = Drift()
    for _ in range(12):
        drift.add(0.0, 0.0)
    assert drift.parts == 2
