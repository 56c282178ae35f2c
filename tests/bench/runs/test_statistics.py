from __future__ import annotations

import math
import statistics
from itertools import product

import numpy as np
import pytest

from specdecode.bench.runs.statistics import (
    Estimate,
    detectable_slowdown,
    figure,
    mean_ratio,
    noise_floor,
    robust_floor,
    robust_ratio,
    simultaneous_ratio,
    student_t,
    typical_ratio,
)


def test_the_mean_ratio_is_the_geometric_mean_over_prompts() -> None:
    """Guards against prompts weighted by their repeats, and against arithmetic means of ratios."""
    ratio = mean_ratio([[math.log(2.0)] * 3, [math.log(8.0)]])
    assert ratio.value == pytest.approx(4.0)
    assert ratio.low <= ratio.value <= ratio.high


def test_no_zero_is_negative() -> None:
    """Guards against `-0.0000` in tables."""
    assert f"{Estimate(-0.00001, -0.02, 0.00001):.4f}" == "0.0000 [-0.0200, 0.0000]"
    assert f"{Estimate(-0.001, -math.inf, math.nan):.0%}" == "0% [-inf%, nan%]"
    assert figure(-0.06, ".1f") == "-0.1"


def test_the_interval_covers_the_true_ratio() -> None:
    """Guards against intervals over repeats instead of prompts, which are far too narrow."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        of_prompt = random.normal(0.3, 0.2, 30)
        logs = [list(random.normal(mean, 0.02, 5)) for mean in of_prompt]
        ratio = mean_ratio(logs)
        covered += ratio.low <= math.exp(0.3) <= ratio.high
    # 95 % of 200, less the known undercoverage of a percentile bootstrap of 30 prompts. Repeats alone give a fifth.
    assert covered >= 176


def test_no_interval_is_narrower_than_the_noise_floor() -> None:
    """Guards against a certain speedup from a few runs that happened to agree."""
    ratio = mean_ratio([[0.5], [0.5], [0.5]], floor=0.1)
    assert (ratio.low, ratio.high) == (pytest.approx(math.exp(0.4)), pytest.approx(math.exp(0.6)))


def test_the_floor_sees_a_drift_between_the_two_runs() -> None:
    """Guards against a floor from the spread alone, which is zero on a machine that slows down steadily."""
    assert noise_floor([0.2, 0.2, 0.2]) == pytest.approx(0.2)
    assert noise_floor([0.0, 0.0]) == 0.0
    assert noise_floor([-0.3]) == 0.3
    stalled = [0.01, -0.01, 0.02, 0.0, -0.02, 6.0]
    assert not typical_ratio(stalled).bounded
    assert noise_floor(stalled) == 6.0


def test_the_floor_is_half_an_interval() -> None:
    """Guards against a floor that counts an offset twice, as noise and as the centre of the interval."""
    noise = [0.02 * (-1) ** place for place in range(12)]
    interval = typical_ratio(noise)
    assert noise_floor(noise) == pytest.approx(math.log(interval.high / interval.low) / 2)


def test_intervals_are_the_same_each_time() -> None:
    """Guards against a verdict that depends on the bootstrap's draw."""
    logs = [[0.1], [0.3], [-0.2], [0.05]]
    assert mean_ratio(logs) == mean_ratio(logs)


def test_the_detectable_slowdown_is_caught_nine_times_in_ten() -> None:
    """Guards against a stated power that the gate does not reach."""
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
    """Guards against a quantile of the other tail, or of both tails together."""
    assert student_t(probability, freedom) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("count", "comparisons", "quantile"), [(2, 1, 12.706), (3, 1, 4.303), (6, 1, 2.571), (6, 5, 4.032), (30, 10, 3.038)]
)
def test_simultaneous_intervals_are_students_with_bonferronis_share(
    count: int, comparisons: int, quantile: float
) -> None:
    """Guards against too narrow intervals for many comparisons or few prompts."""
    logs = [0.01 * (i % 2) for i in range(count)]
    half = quantile * float(np.std(logs, ddof=1)) / math.sqrt(count)
    ratio = simultaneous_ratio(logs, comparisons)
    assert math.log(ratio.value) == pytest.approx(float(np.mean(logs)))
    assert math.log(ratio.high / ratio.value) == pytest.approx(half, rel=2e-4)
    assert math.log(ratio.value / ratio.low) == pytest.approx(half, rel=2e-4)
    assert math.log(simultaneous_ratio(logs, comparisons, floor=0.3).high / ratio.value) == pytest.approx(0.3)


def test_an_interval_of_nothing_has_no_end() -> None:
    """Guards against one prompt accepted as proof, and against an overflow for two prompts far apart."""
    for logs in ([0.5], [-3.0, 4.0]):
        ratio = simultaneous_ratio(logs, 13)
        assert (ratio.low, ratio.high) == (0.0, math.inf)


def bursty(seed: int, count: int, change: float = 0.0, disturbed: float = 0.2) -> list[float]:
    """Return logarithms of paired ratios with small noise, and bursts of outliers to either side."""
    chance = np.random.default_rng(seed)
    noise = chance.normal(0, 0.01, count)
    place = 0
    while place < count:
        length = int(chance.integers(1, 4))
        if chance.random() < disturbed / 2:
            noise[place : place + length] += chance.normal(0, 0.3)
        place += length
    return list(change + noise)


@pytest.mark.parametrize("count", [6, 12, 40, 200])
@pytest.mark.parametrize("disturbed", [0.0, 0.2])
def test_a_robust_interval_covers_the_ratio_and_convicts_no_equal_code(count: int, disturbed: float) -> None:
    """Guards against an interval that is too narrow on a machine where other work takes the processor now and then."""
    runs = 300
    covered, convicted = 0, 0
    for seed in range(runs):
        change = robust_ratio(bursty(seed, count, math.log(0.9), disturbed))
        covered += change.low <= 0.9 <= change.high
        convicted += robust_ratio(bursty(seed, count, 0.0, disturbed)).high < 0.98
    # 95 %, less a little for disturbances longer than a batch, and less three standard deviations of the simulation.
    assert covered / runs > 0.94 - 3 * math.sqrt(0.95 * 0.05 / runs)
    assert convicted == 0


def test_a_robust_interval_sees_what_a_mean_does_not() -> None:
    """Guards against a verdict decided by three disturbed measurements of dozens."""
    runs = 100
    values = [bursty(seed, 60, math.log(0.95)) for seed in range(runs)]
    seen = sum(robust_ratio(logs).high < 0.98 for logs in values)
    by_mean = sum(mean_ratio([[log] for log in logs]).high < 0.98 for logs in values)
    assert seen >= 95
    assert by_mean < 80


@pytest.mark.parametrize("count", [6, 7, 11])  # values; the shortest has no batches
def test_the_ends_of_a_robust_interval_are_wilcoxons(count: int) -> None:
    """Guards against ranks that are off by one. The test tries all signs of the ranks."""
    sums = [
        sum(rank for rank, positive in enumerate(signs, start=1) if positive)
        for signs in product((False, True), repeat=count)
    ]
    outside = next(least for least in range(999) if sum(total <= least for total in sums) > 0.025 * len(sums))
    values = [1.0 + 2.0**-place for place in range(count)]
    means = sorted((a + b) / 2 for place, a in enumerate(values) for b in values[place:])
    change = robust_ratio(values if count == 6 else [value for value in values for _ in range(3)])
    assert math.log(change.low) == pytest.approx(means[outside - 1])
    assert math.log(change.high) == pytest.approx(means[-outside])
    assert math.log(change.value) == pytest.approx(statistics.median(means))


def test_few_measurements_say_nothing() -> None:
    """Guards against a rank interval of five values, which cannot reach 95 %. Student's interval is wider."""
    five = [0.1, 0.12, 0.09, 0.11, 0.08]
    half = 2.776 * float(np.std(five, ddof=1)) / math.sqrt(5)
    assert math.log(typical_ratio(five).high) == pytest.approx(0.1 + half, rel=1e-3)
    assert typical_ratio([0.1]).high == math.inf
    assert robust_floor([0.1] * 6) == pytest.approx(0.1)
    assert robust_ratio([0.1] * 6, floor=0.3).low == pytest.approx(math.exp(-0.2))
