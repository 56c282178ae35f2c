"""What a sample of documents or tasks says of all such: intervals, non-inferiority, and flips."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_RESAMPLES = 10_000
# Of fewer the interval's ends lie beyond every resample, and what is left of it covers far less than it says.
_LEAST_DOCUMENTS = 5
_COVERAGE = 0.95
_POWER = 0.9
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the interval that covers it with 95 %."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


class Verdict(str, enum.Enum):
    """What an interval says of a margin."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


def ratio_of_sums(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The sum of one figure over the sum of another, each taken document by document: a mean over tokens, say.

    Tokens of one document resemble each other, so the bootstrap resamples documents (Efron 1979). Of few documents a
    percentile interval is too narrow; its ends are taken further out, by as much as Student's t is wider than the
    normal law and a sample's spread smaller than its population's (the expanded percentile interval of Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap").

    Args:
        above: of each document, the sum of what is averaged.
        below: of each document, what it is divided by: its tokens.

    Returns:
        The ratio; of fewer than five documents with an interval without end.

    Raises:
        ValueError: no documents, or lists that are not of one length.
    """
    if not above or len(above) != len(below):
        raise ValueError(
            f"{len(above)} and {len(below)} documents cannot be compared: give one figure of each for each"
        )
    numerators, denominators = np.array(above, dtype=float), np.array(below, dtype=float)
    count = len(numerators)
    value = float(numerators.sum() / denominators.sum())
    if count < _LEAST_DOCUMENTS:
        return Estimate(value, -math.inf, math.inf)
    draws = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    ratios = numerators[draws].sum(1) / denominators[draws].sum(1)
    out = math.sqrt(count / (count - 1)) * student_t((1 + _COVERAGE) / 2, count - 1)
    low, high = np.quantile(ratios, [_NORMAL.cdf(-out), _NORMAL.cdf(out)])
    return Estimate(value, float(low), float(high))


def student_t(share: float, freedom: int) -> float:
    """The quantile of Student's t (from the series 26.7.3 and 26.7.4 of Abramowitz and Stegun 1964).

    Args:
        share: above one half and below 1.
        freedom: degrees of it, 1 or more.
    """

    def within(angle: float) -> float:
        """P(|t| <= sqrt(freedom) tan(angle))."""
        odd = freedom % 2
        term = total = float(freedom > 1)
        for k in range(2 + odd, freedom - 1, 2):
            term *= (k - 1) / k * math.cos(angle) ** 2
            total += term
        if odd:
            return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * share - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def non_inferior(cost: Estimate, margin: float) -> Verdict:
    """Whether a cost stays within what was said of it: PASS if the whole interval does, FAIL if none of it, and
    INCONCLUSIVE if it was measured too coarsely to tell."""
    if cost.high <= margin:
        return Verdict.PASS
    return Verdict.FAIL if cost.low > margin else Verdict.INCONCLUSIVE


def detectable(cost: Estimate) -> float:
    """The smallest cost that a measurement as coarse as this one tells from none, with a power of 90 %: half an
    interval and 1.28 standard errors more, of which half an interval is 1.96."""
    half = (cost.high - cost.low) / 2
    return half * (1 + _NORMAL.inv_cdf(_POWER) / _NORMAL.inv_cdf((1 + _COVERAGE) / 2))


def wilson(passed: int, count: int) -> Estimate:
    """The share of tasks that are solved, with its score interval (Wilson 1927), which has a width for none and all of
    a few too.

    Args:
        passed: of them.
        count: 1 or more.

    Raises:
        ValueError: no tasks, or more passed than there are.
    """
    if not 0 <= passed <= count or not count:
        raise ValueError(f"{passed} of {count} tasks are no share: give at least one task, and no more than all")
    share, z = passed / count, _NORMAL.inv_cdf((1 + _COVERAGE) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))


def paired_loss(lost: int, won: int, count: int) -> Estimate:
    """By how much the share of solved tasks is smaller than the reference's, with the score interval for paired
    proportions (Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design"). Unlike a bootstrap it has a width where nothing flipped: of n such tasks, up to
    3.84 / (n + 3.84).

    Args:
        lost: tasks that were solved by the reference only.
        won: tasks that the reference did not solve.
        count: all tasks.

    Raises:
        ValueError: counts that cannot be.
    """
    if min(lost, won) < 0 or lost + won > count or not count:
        raise ValueError(f"{lost} tasks lost and {won} won of {count}: counts are 0 or more, and no more than all")
    z2 = _NORMAL.inv_cdf((1 + _COVERAGE) / 2) ** 2

    def plausible(loss: float) -> bool:
        """Whether the score test does not reject this loss; 2 * win + loss - loss ** 2 is the variance under it."""
        b = (2 * count - lost + won) * loss - lost - won
        win = (math.sqrt(max(b**2 + 8 * count * won * loss * (1 - loss), 0.0)) - b) / (4 * count)
        return (lost - won - count * loss) ** 2 <= z2 * count * max(2 * win + loss - loss**2, 0.0)

    value = (lost - won) / count
    ends = []
    for end in (-1.0, 1.0):
        inside = value
        for _ in range(60):
            middle = (inside + end) / 2
            inside, end = (middle, end) if plausible(middle) else (inside, middle)
        ends.append(inside)
    return Estimate(value, *ends)


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947): how probable it is, if tasks are lost as easily as won,
    that flips are as uneven as these or more.

    Args:
        lost: tasks that were solved by the reference only.
        won: tasks that the reference did not solve.

    Raises:
        ValueError: a count below 0.
    """
    if lost < 0 or won < 0:
        raise ValueError(f"{lost} tasks lost and {won} won: counts are 0 or more")
    flips = lost + won
    tail: int = sum(math.comb(flips, i) for i in range(min(lost, won) + 1))
    return min(2 * tail / (1 << flips), 1.0)
