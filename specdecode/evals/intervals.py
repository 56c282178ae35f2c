"""Estimate costs in quality from documents or tasks, with intervals that are valid for small samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from specdecode.bench.runs.statistics import COVERAGE, Estimate, bootstrap, student_t

# With fewer documents the interval's ends lie beyond every resample, and the interval covers far less than it states.
_LEAST_DOCUMENTS = 5
_NORMAL = NormalDist()


def ratio_of_sums(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Estimate a mean over tokens as a ratio of two sums over documents, with a bootstrap over documents.

    With few documents a percentile interval is too narrow, so its ends are moved outwards: by the ratio of Student's t
    to the normal distribution, and of a population's spread to a sample's. This is the expanded percentile interval
    (Hesterberg 2015, "What Teachers Should Know About the Bootstrap").

    Args:
        above: numerator of each document: the sum of the averaged quantity.
        below: denominator of each document: its number of tokens.

    Returns:
        The ratio with its interval; the interval is infinite with fewer than five documents.

    Raises:
        ValueError: no documents, or lists of different lengths.
    """
    if not above or len(above) != len(below):
        raise ValueError(
            f"{len(above)} and {len(below)} documents cannot be compared: give both figures of every document"
        )
    count = len(above)
    if count < _LEAST_DOCUMENTS:
        return Estimate(sum(above) / sum(below), -math.inf, math.inf)
    deviations = math.sqrt(count / (count - 1)) * student_t((1 + COVERAGE) / 2, count - 1)
    return bootstrap(above, below, tail=_NORMAL.cdf(-deviations))


def wilson(passed: int, count: int) -> Estimate:
    """Estimate the share of solved tasks, with the score interval (Wilson 1927).

    Unlike a bootstrap interval, it has a width even if none or all of a few tasks are solved.

    Args:
        passed: number of solved tasks.
        count: number of tasks, 1 or more.

    Raises:
        ValueError: no tasks, or more solved tasks than tasks.
    """
    if not 0 <= passed <= count or not count:
        raise ValueError(f"{passed} of {count} tasks are no share: give at least one task, and no more than all")
    # Imported here, because the import needs a second.
    from scipy.stats import binomtest

    interval = binomtest(passed, count).proportion_ci(confidence_level=COVERAGE, method="wilson")
    return Estimate(passed / count, float(interval.low), float(interval.high))


def paired_loss(lost: int, won: int, count: int) -> Estimate:
    """Estimate the difference between the reference's share of solved tasks and the arm's share.

    The interval is the score interval for paired proportions (Tango 1998, "Equivalence test and confidence interval for
    the difference in proportions for the paired-sample design"). Unlike a bootstrap interval, it has a width even if no
    task is lost or won: with n tasks it ends at 3.84 / (n + 3.84).

    Args:
        lost: number of tasks that only the reference solved.
        won: number of tasks that only the arm solved.
        count: number of all tasks.

    Raises:
        ValueError: impossible counts.
    """
    if min(lost, won) < 0 or lost + won > count or not count:
        raise ValueError(f"{lost} tasks lost and {won} won of {count}: counts are 0 or more, and no more than all")
    z2 = _NORMAL.inv_cdf((1 + COVERAGE) / 2) ** 2

    def plausible(loss: float) -> bool:
        """Return whether the score test keeps this loss; 2 * win + loss - loss ** 2 is the variance under it."""
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
    """Return the exact two-sided p-value of McNemar's test (1947).

    It is the probability of counts at least as uneven as these if a task is lost and won with equal probability.

    Args:
        lost: number of tasks that only the reference solved.
        won: number of tasks that only the arm solved.

    Raises:
        ValueError: a count below 0.
    """
    if lost < 0 or won < 0:
        raise ValueError(f"{lost} tasks lost and {won} won: counts are 0 or more")
    if not lost + won:
        return 1.0
    # Imported here, because the import needs a second.
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue)
