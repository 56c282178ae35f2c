from __future__ import annotations

import math

import numpy as np
import pytest

from specdecode.bench.runs.statistics import (
    Estimate,
    detectable_slowdown,
    mean_ratio,
    noise_floor,
    simultaneous_ratio,
    student_t,
)


def test_the_mean_ratio_is_the_geometric_mean_over_prompts() -> None:
    """Guards against prompts weighted by their repeats, and against arithmetic means of ratios."""
    ratio = mean_ratio([[math.log(2.0)] * 3, [math.log(8.0)]])
    assert ratio.value == pytest.approx(4.0)
    assert ratio.low <= ratio.value <= ratio.high


def test_the_interval_covers_the_true_ratio() -> None:
    """Guards against intervals over repeats instead of prompts, which are far too narrow."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        of_prompt = random.normal(0.3, 0.2, 30)
        logs = [list(random.normal(mean, 0.02, 5)) for mean in of_prompt]
        ratio = mean_ratio(logs)
        covered += ratio.low <= math.exp(0.3) <= ratio.high
    # 95 % of 200, less what a percentile bootstrap of 30 prompts is known to lack; repeats alone would give a fifth.
    assert covered >= 176


def test_no_interval_is_narrower_than_the_noise_floor() -> None:
    """Guards against a certain speedup from a few runs that happened to agree."""
    ratio = mean_ratio([[0.5], [0.5], [0.5]], floor=0.1)
    assert (ratio.low, ratio.high) == (pytest.approx(math.exp(0.4)), pytest.approx(math.exp(0.6)))


def test_the_floor_sees_a_drift_between_the_two_runs() -> None:
    """Guards against a floor of spread alone: a machine that slows down steadily shows none."""
    assert noise_floor([[0.2], [0.2], [0.2]]) == pytest.approx(0.2)
    assert noise_floor([[0.0], [0.0]]) == 0.0


def test_intervals_are_the_same_each_time() -> None:
    """Guards against a verdict that depends on the bootstrap's draw."""
    logs = [[0.1], [0.3], [-0.2], [0.05]]
    assert mean_ratio(logs) == mean_ratio(logs)


def test_the_detectable_slowdown_is_caught_nine_times_in_ten() -> None:
    """Guards against a promise of power that the gate's own rule does not keep."""
    random = np.random.default_rng(2)
    tolerance, scatter, prompts = 0.02, 0.03, 30

    def change(slowdown: float) -> Estimate:
        return mean_ratio([[math.log1p(-slowdown) + noise] for noise in random.normal(0, scatter, prompts)])

    promised = float(np.mean([detectable_slowdown(change(0.0), tolerance) for _ in range(50)]))
    caught = sum(change(promised).high < 1 - tolerance for _ in range(300)) / 300
    assert 0.85 < caught < 0.96
    assert sum(change(0.0).high < 1 - tolerance for _ in range(300)) == 0


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # From printed tables.
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 5, 2.571),
        (0.975, 7, 2.365),
        (0.95, 10, 1.812),
        (0.975, 200, 1.972),
    ],
)
def test_quantiles_of_students_t(probability: float, freedom: int, expected: float) -> None:
    """Guards against a quantile of the other tail, or of both together."""
    assert student_t(probability, freedom) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("count", "comparisons", "quantile"), [(2, 1, 12.706), (3, 1, 4.303), (6, 1, 2.571), (6, 5, 4.032), (30, 10, 3.038)]
)
def test_simultaneous_intervals_are_students_with_bonferronis_share(
    count: int, comparisons: int, quantile: float
) -> None:
    """Guards against intervals of many comparisons, or of a few prompts, that are as narrow as one of a hundred."""
    logs = [0.01 * (i % 2) for i in range(count)]
    half = quantile * float(np.std(logs, ddof=1)) / math.sqrt(count)
    ratio = simultaneous_ratio(logs, comparisons)
    assert math.log(ratio.value) == pytest.approx(float(np.mean(logs)))
    assert math.log(ratio.high / ratio.value) == pytest.approx(half, rel=2e-4)
    assert math.log(ratio.value / ratio.low) == pytest.approx(half, rel=2e-4)
    assert math.log(simultaneous_ratio(logs, comparisons, floor=0.3).high / ratio.value) == pytest.approx(0.3)


def test_an_interval_of_nothing_has_no_end() -> None:
    """Guards against one prompt that proves something, and against an overflow where two are apart."""
    for logs in ([0.5], [-3.0, 4.0]):
        ratio = simultaneous_ratio(logs, 13)
        assert (ratio.low, ratio.high) == (0.0, math.inf)
