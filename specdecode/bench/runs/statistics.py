"""Means of paired log ratios, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

_RESAMPLES = 10_000
_COVERAGE = 0.95
# Of Student's t, for its quantiles.
_DRAWS = 2**20
# An interval that reaches beyond a tenth and ten times its centre says nothing.
_NOTHING = math.log(10)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio and the interval that covers it with 95 %."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_ratio(logs: Sequence[Sequence[float]], floor: float = 0.0) -> Ratio:
    """The geometric mean of ratios, from their logarithms, one sequence of repeats for each prompt.

    Repeats of one prompt are averaged first: prompts are what is drawn from a population, so the bootstrap (percentile
    interval, Efron 1979) resamples them and not the repeats.

    Args:
        logs: log ratios, prompt by prompt.
        floor: least half-width of the interval, in logarithms: what two runs of the same code differ by.
    """
    means = np.array([np.mean(repeats) for repeats in logs])
    centre = float(means.mean())
    draws = np.random.default_rng(0).integers(0, len(means), (_RESAMPLES, len(means)))
    tail = (1 - _COVERAGE) / 2
    low, high = np.quantile(means[draws].mean(1), [tail, 1 - tail])
    return Ratio(
        math.exp(centre), math.exp(min(float(low), centre - floor)), math.exp(max(float(high), centre + floor))
    )


def simultaneous_ratio(logs: Sequence[float], comparisons: int, floor: float = 0.0) -> Ratio:
    """The geometric mean of ratios, with an interval that is one of many: with 95 % all of them cover what they should.

    Each gets its part of the 5 % (Bonferroni's inequality; Dunn 1961), in Student's t (1908): a bootstrap's percentiles
    end where the data do, and what they lack where prompts are few is what many comparisons ask for.

    Args:
        logs: log ratios, one a prompt.
        comparisons: how many intervals are looked at together.
        floor: least half-width, as for `mean_ratio`.
    """
    centre, count = float(np.mean(logs)), len(logs)
    half = math.inf
    if count > 1:
        half = max(floor, _student(count - 1, comparisons) * float(np.std(logs, ddof=1)) / math.sqrt(count))
    if half > _NOTHING:
        return Ratio(math.exp(centre), 0.0, math.inf)
    return Ratio(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


@cache
def _student(freedom: int, comparisons: int) -> float:
    """What |t| exceeds with a probability of 5 % over the number of comparisons, within some percent: from draws."""
    draws = np.abs(np.random.default_rng(0).standard_t(freedom, _DRAWS))
    return float(np.quantile(draws, 1 - (1 - _COVERAGE) / comparisons))


def detectable(change: Ratio, tolerance: float) -> float:
    """The smallest slowdown, as a share, that a comparison as noisy as this one calls one with a power of 90 %.

    A slowdown is called when the whole interval lies beyond the tolerance: so its centre must lie half an interval
    beyond, and another 1.28 standard errors for nine times out of ten, of which half an interval is 1.96.
    """
    half = math.log(change.high / change.low) / 2
    return -math.expm1(math.log1p(-tolerance) - half * (1 + 1.2816 / 1.96))


def noise_floor(logs: Sequence[Sequence[float]]) -> float:
    """The A/A floor: how far from 1 the mean ratio of two runs of the same code may lie, in logarithms.

    Args:
        logs: log ratios of the first run of a block to its second, prompt by prompt.
    """
    interval = mean_ratio(logs)
    return max(abs(math.log(interval.low)), abs(math.log(interval.high)))
