"""Estimates of means and ratios of paired measurements, each with its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

COVERAGE = 0.95
"""The probability with which an interval covers the true value."""

TAIL = (1 - COVERAGE) / 2
"""The probability below an interval's low end, and above its high end."""

NOISE_OF_TWO = math.sqrt(0.75)
"""Factor from the noise of a ratio of two runs of the reference arm to the noise of an arm's ratio. An arm is compared
with the mean of its reference arm's two runs, and that ratio varies less."""

_POWER = 0.9
_RESAMPLES = 10_000
_MOST_CACHED_BOOTSTRAPS = 4096
_MOST_EXACT_RANKS = 50
# From simulated disturbances of up to three measurements: smaller or more batches miss the true ratio too often.
_LEAST_BATCH, _LEAST_BATCHES, _MOST_BATCHES = 3, 6, 30
_NORMAL = NormalDist()
# An interval beyond a tenth and ten times its centre carries no information.
_WIDEST_LOG_RATIO = math.log(10)


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimated value and the interval that covers the true value with a confidence of 95 %."""

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether both ends of the interval are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        value, low, high = (figure(number, spec) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def figure(value: float, spec: str) -> str:
    """Format a number, without the sign of a negative one that rounds to zero."""
    text = format(value, spec)
    return text.removeprefix("-") if set(text) <= set("-0.%") else text


UNKNOWN = Estimate(math.nan, math.nan, math.nan)
"""The estimate of an unknown value."""


def bootstrap(sums: Sequence[float], weights: Sequence[float], tail: float = TAIL) -> Estimate:
    """Estimate a ratio of sums over clusters with the percentile bootstrap (Efron 1979).

    Measurements within a cluster resemble each other, so whole clusters are resampled: prompts or documents. The draws
    are the same in every call, so that a verdict does not depend on them.

    Args:
        sums: sum of each cluster, for the numerator.
        weights: weight of each cluster, for the denominator.
        tail: probability below the interval's low end, and above its high end.
    """
    return _bootstrap(tuple(map(float, sums)), tuple(map(float, weights)), tail)


@lru_cache(maxsize=_MOST_CACHED_BOOTSTRAPS)
def _bootstrap(sums: tuple[float, ...], weights: tuple[float, ...], tail: float) -> Estimate:
    """Compute the bootstrap once for equal measurements: a page's tables need the same estimate many times."""
    numerators, denominators = np.array(sums), np.array(weights)
    count = len(numerators)
    draws = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    ratios = numerators[draws].sum(1) / denominators[draws].sum(1)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Estimate(float(numerators.sum() / denominators.sum()), float(low), float(high))


def mean_ratio(logs: Sequence[Sequence[float]], floor: float = 0.0) -> Estimate:
    """Estimate the geometric mean of ratios, with a bootstrap over prompts.

    The repeats of a prompt are averaged first: only the prompts are a sample from a population.

    Args:
        logs: logarithms of the ratios, a sequence of repeats for each prompt.
        floor: least half-width of the interval, in logarithms: the difference between two runs of the same code.
    """
    mean = bootstrap([float(np.mean(repeats)) for repeats in logs], [1.0] * len(logs))
    low, high = min(mean.low, mean.value - floor), max(mean.high, mean.value + floor)
    return Estimate(math.exp(mean.value), math.exp(low), math.exp(high))


def typical_ratio(logs: Sequence[float], floor: float = 0.0, tail: float = TAIL) -> Estimate:
    """Estimate the common ratio of paired measurements. A few disturbed measurements hardly change it.

    The estimate is the median of the means of all pairs of measurements (Hodges and Lehmann 1963). Its interval is from
    Wilcoxon's signed ranks: exact for symmetric noise, as between equal code. It needs six measurements for 95 %. With
    fewer, interval and estimate are Student's (1908), for normal noise.

    Args:
        logs: logarithms of the ratios.
        floor: least half-width of the interval, in logarithms.
        tail: probability below the interval's low end, and above its high end.
    """
    values = np.array(logs, dtype=float)
    outside = _signed_ranks_outside(len(values), tail)
    if outside:
        first, second = np.triu_indices(len(values))
        means = np.sort((values[first] + values[second]) / 2)
        centre, low, high = float(np.median(means)), float(means[outside - 1]), float(means[-outside])
    else:
        centre = float(np.mean(values))
        half = _student_half(values, tail)
        low, high = centre - half, centre + half
    return _estimate(centre, min(low, centre - floor), max(high, centre + floor))


def robust_ratio(logs: Sequence[float], floor: float = 0.0) -> Estimate:
    """Estimate a ratio from many short paired measurements in a row.

    A disturbance lasts, so it spoils consecutive measurements. Therefore the measurements are split into batches, and
    each batch gives its median (after batch means, Conway 1963). `typical_ratio` estimates from these medians.

    Args:
        logs: logarithms of the ratios, in the order of measuring.
        floor: least half-width of the interval, in logarithms.
    """
    return typical_ratio(_batch_medians(logs), floor)


def _batch_medians(logs: Sequence[float]) -> list[float]:
    batches = min(_MOST_BATCHES, max(len(logs) // _LEAST_BATCH, min(len(logs), _LEAST_BATCHES)))
    return [float(np.median(batch)) for batch in np.array_split(np.array(logs), batches)]


def noise_floor(logs: Sequence[float]) -> float:
    """Return the A/A floor: how far from 1 `typical_ratio` may find the ratio of equal code, in logarithms.

    That is the half-width of its interval, or its estimate if that is farther from 1. For fewer than six ratios, or an
    interval without bounds, it is the ratio farthest from 1.

    Args:
        logs: logarithms of ratios between runs of the same code. Their noise must be that of the comparison.
    """
    if not _signed_ranks_outside(len(logs), TAIL):
        return max((abs(log) for log in logs), default=0.0)
    ratio = typical_ratio(logs)
    if not ratio.bounded:
        return max(abs(log) for log in logs)
    return max(abs(math.log(ratio.value)), math.log(ratio.high / ratio.low) / 2)


def robust_floor(logs: Sequence[float]) -> float:
    """Return the A/A floor of `robust_ratio`, in logarithms."""
    return noise_floor(_batch_medians(logs))


def _estimate(centre: float, low: float, high: float) -> Estimate:
    """Build an estimate from logarithms; without bounds if the interval is too wide to carry information."""
    if high - low > 2 * _WIDEST_LOG_RATIO:
        return Estimate(math.exp(centre), 0.0, math.inf)
    return Estimate(math.exp(centre), math.exp(low), math.exp(high))


def _student_half(values: np.ndarray, tail: float) -> float:
    """Return the half-width of the interval of a mean by Student's t; infinite for one value."""
    count = len(values)
    if count < 2:
        return math.inf
    return student_t(1 - tail, count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)


@lru_cache
def _signed_ranks_outside(count: int, tail: float) -> int:
    """Return the number of sorted means of pairs that lie outside of the interval at either end.

    That is the largest c for which the sum of positive signed ranks is below c with a probability of at most `tail`.
    For many values the sum is taken as normal.
    """
    if count > _MOST_EXACT_RANKS:
        mean, variance = count * (count + 1) / 4, count * (count + 1) * (2 * count + 1) / 24
        return math.floor(mean - _NORMAL.inv_cdf(1 - tail) * math.sqrt(variance))
    sums = [1]  # number of ways to get each sum from the ranks so far
    for rank in range(1, count + 1):
        sums = [
            (sums[total] if total < len(sums) else 0) + (sums[total - rank] if total >= rank else 0)
            for total in range(len(sums) + rank)
        ]
    allowed, seen, outside = tail * 2**count, 0, 0
    while (seen := seen + sums[outside]) <= allowed:
        outside += 1
    return outside


def simultaneous_ratio(logs: Sequence[float], comparisons: int, floor: float = 0.0) -> Estimate:
    """Estimate the geometric mean of ratios, with one of several intervals that hold together with 95 %.

    Each interval gets an equal part of the 5 % (Bonferroni's inequality; Dunn 1961), by Student's t (1908). A bootstrap
    is not possible here: many comparisons need percentiles that lie beyond the data of few prompts.

    Args:
        logs: logarithms of the ratios, one for each prompt.
        comparisons: number of intervals that hold together.
        floor: least half-width of the interval, as for `mean_ratio`.
    """
    centre, tail = float(np.mean(logs)), TAIL / comparisons
    half = max(floor, _student_half(np.array(logs, dtype=float), tail))
    return _estimate(centre, centre - half, centre + half)


def student_t(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t.

    Args:
        probability: probability of a value below the quantile.
        freedom: degrees of freedom, 1 or more.
    """
    # Imported here because the import takes a second, and a gate with enough measurements does not need it.
    from scipy.stats import t

    return float(t.ppf(probability, freedom))


def detectable(estimate: Estimate) -> float:
    """Return the smallest effect that an interval of this width detects with a power of 90 %.

    The true value must lie half a width away, which is 1.96 standard errors, and 1.28 more for a power of 90 %.
    """
    half = (estimate.high - estimate.low) / 2
    return half * (1 + _NORMAL.inv_cdf(_POWER) / _NORMAL.inv_cdf((1 + COVERAGE) / 2))


def detectable_slowdown(change: Estimate, tolerance: float) -> float:
    """Return the smallest slowdown, as a share, that an equally noisy comparison detects with a power of 90 %.

    A slowdown is detected when the whole interval lies beyond the tolerance.

    Args:
        change: new speed over old. Without a bounded interval, only a complete loss of speed is detected.
        tolerance: share by which the new speed may be lower.
    """
    if not change.bounded or not change.low:
        return 1.0
    logs = Estimate(*map(math.log, (change.value, change.low, change.high)))
    return -math.expm1(math.log1p(-tolerance) - detectable(logs))


def contrast(new: Sequence[float], old: Sequence[float], new_first: bool) -> float:
    """Return the noise of a logarithm of a ratio, from runs of two versions in the order A B B A.

    It is the cubic contrast (-1, 3, -3, 1) of the four logarithms, over the root of 20. It compares only runs of the
    same version with each other, and a linear drift does not change it. It varies as much as the logarithm does.

    Args:
        new, old: seconds of each version's first and second run.
        new_first: whether the new version is A.
    """
    outer, inner = (new, old) if new_first else (old, new)
    return (math.log(outer[1] / outer[0]) - 3 * math.log(inner[1] / inner[0])) / math.sqrt(20)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the points that no other point dominates, in the order of their first coordinate.

    A point dominates another if it is better in one coordinate and not worse in the other.

    Args:
        points: coordinates by name; more is better in both.
    """
    best, front = -math.inf, []
    for name in sorted(points, key=lambda name: points[name], reverse=True):
        if points[name][1] > best:
            best = points[name][1]
            front.append(name)
    return front[::-1]


def staircase(front: Sequence[tuple[float, float]], start: float, end: float) -> list[tuple[float, float]]:
    """Return the corners of the line through a Pareto front, from the first coordinate `start` to the second `end`."""
    corners = [(start, front[0][1])]
    for x, y in front:
        corners += [(corners[-1][0], y), (x, y)]
    return [*corners, (corners[-1][0], end)]


def known(value: float) -> float | None:
    """Return a number; None if it is infinite or nan."""
    return value if math.isfinite(value) else None


def percentile_95(values: Sequence[float]) -> float | None:
    """Return the 95th percentile of the values; None if there are none."""
    return float(np.percentile(values, 95)) if values else None


def median(values: Sequence[float | None]) -> float | None:
    """Return the median; None if there are no values, or one of them is unknown."""
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers and len(numbers) == len(values) else None
