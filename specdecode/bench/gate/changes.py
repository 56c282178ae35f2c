"""Lasting changes of speed over many versions: a step at one version, or a drift over several.

The search takes the strongest of many shapes. The probability of such a shape by chance is the share of permuted series
whose strongest shape is as strong. This accounts for the number of shapes, and noise need not be normal (Westfall and
Young 1993). Daly et al. 2020 search series of benchmarks in this way, "The Use of Change Point Detection to Identify
Software Performance Regressions in a Continuous Integration System". The shapes are

- ramps from one level to another, including steps: eight versions that lose 1 % each are one ramp, as in tests of
  several contrasts for trends (Bretz and Hothorn 2002);
- arcs, another level for a while: circular binary segmentation (Olshen et al. 2004). Without them a gain hides the
  later loss of the same size.

The parts before, within and after a change are searched again, and share its level. Noise is assumed to be independent
between versions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np

from specdecode.bench.gate.series import Series, series
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import COVERAGE, Estimate, student_t

LEAST_VERSIONS = 6
"""Least length of a searched series: shorter ones have too few permutations for a small probability."""

MOST_VERSIONS = 60
"""Largest number of searched versions, the newest: the number of shapes grows with its square."""

LEVEL = 1 - COVERAGE
"""The probability of finding a change where there is none, in any arm of a baseline."""

Pairs = tuple[tuple[int, int], ...]
"""Pairs of versions. For a change: the last before it and the first after it. For a part: its first version and the
version after its last."""

_SMALLEST_LOG_CHANGE = 1e-3  # smaller changes do not matter, and may be rounding
_BATCH, _MOST_BATCHES = 500, 20  # permutations
_ENOUGH_STRONGER = 50  # permutations; with this many the probability is too large, and more draws would not help


@dataclass(frozen=True, slots=True)
class Change:
    """One lasting change of a speed.

    Attributes:
        start: the last version with the old speed.
        end: the first version with the new speed: the version after `start` for a step.
        ratio: new speed over old, with its interval.
        p: the probability of such a change by chance in any of the searched series.
    """

    start: int
    end: int
    ratio: Estimate
    p: float

    @property
    def slower(self) -> bool:
        """Whether the speed is lower after the change."""
        return self.ratio.value < 1


@dataclass(frozen=True, slots=True)
class Course:
    """An arm's speed over the versions, and its changes."""

    series: Series
    changes: list[Change]

    @property
    def long_enough(self) -> bool:
        """Whether there are enough versions to find a change."""
        return len(self.series.logs) >= LEAST_VERSIONS

    @property
    def total(self) -> float:
        """Return the ratio of speeds over all changes together."""
        return math.prod(change.ratio.value for change in self.changes)


def courses(runs: Sequence[RunFile], arm: str | None = None) -> dict[str, Course]:
    """Find the changes in the speed of each arm in the newest version, except peers.

    Args:
        runs: versions of one baseline, the oldest first; `MOST_VERSIONS` at most.
        arm: search only this arm; all if None.

    Raises:
        ValueError: the newest version does not have the arm.
    """
    ours = [name for name, record in runs[-1].arms.items() if not record.peer]
    if arm is not None and arm not in ours:
        raise ValueError(f"{runs[-1].path} has no arm {arm!r} of ours: choose from {', '.join(ours)}")
    of_arms = {name: series(name, runs) for name in ours if arm in (None, name)}
    searched = sum(len(of_arm.logs) >= LEAST_VERSIONS for of_arm in of_arms.values())
    level = LEVEL / max(1, searched)
    return {name: Course(of_arm, find_changes(of_arm.logs, level)) for name, of_arm in of_arms.items()}


def find_changes(logs: Sequence[float], level: float = LEVEL) -> list[Change]:
    """Find the changes in a series, in order.

    Args:
        logs: natural logarithms of speeds, the oldest version first.
        level: the probability of finding a change in a series without one: `LEVEL` divided by the number of series.
    """
    values = np.asarray(logs, dtype=float)
    places = sorted(_search(values, 0, level))
    sizes = _sizes(values, [(start, end) for start, end, _ in places])
    return [
        Change(start, end, ratio, p)
        for (start, end, p), ratio in zip(places, sizes, strict=True)
        if abs(math.log(ratio.value)) >= _SMALLEST_LOG_CHANGE
    ]


def _search(values: np.ndarray, first: int, level: float) -> Iterator[tuple[int, int, float]]:
    """Yield start, end and p of each change in a part of a series. The part begins at version `first`."""
    if len(values) < LEAST_VERSIONS or np.ptp(values) < _SMALLEST_LOG_CHANGE:
        return
    strongest, p = _strongest(values)
    if p > level:
        return
    changes, parts = _shapes(len(values))[1][strongest]
    for start, end in changes:
        yield first + start, first + end, min(1.0, p * LEVEL / level)
    for begin, stop in parts:
        yield from _search(values[begin:stop], first + begin, level / len(parts))


@lru_cache(maxsize=MOST_VERSIONS)
def _shapes(count: int) -> tuple[np.ndarray, list[tuple[Pairs, Pairs]]]:
    """Return the shapes for series of a length.

    Returns:
        The shapes as columns with mean 0 and length 1; and for each shape its changes and the parts around them.
    """
    columns: list[np.ndarray] = []
    about: list[tuple[Pairs, Pairs]] = []
    for start, end in combinations(range(count), 2):
        columns.append(_ramp(count, start, end))
        about.append((((start, end),), ((0, start + 1), (end, count))))
    for begin, stop in combinations(range(1, count), 2):
        columns.append(_ramp(count, begin - 1, begin) - _ramp(count, stop - 1, stop))
        changes, edges = ((begin - 1, begin), (stop - 1, stop)), (0, begin, stop, count)
        about.append((changes, tuple(pairwise(edges))))
    shapes = np.stack(columns, axis=1)
    shapes -= shapes.mean(0)
    return shapes / np.linalg.norm(shapes, axis=0), about


def _ramp(count: int, start: int, end: int) -> np.ndarray:
    return np.clip((np.arange(count) - start) / (end - start), 0.0, 1.0)


def _strongest(values: np.ndarray) -> tuple[int, float]:
    """Return the index of the shape that explains most of a series, and the probability that it does by chance.

    The probability is the share of permuted series that a shape explains as well. Drawing permutations ends early if
    that share is large (Besag and Clifford 1991).
    """
    shapes, _ = _shapes(len(values))
    strengths = np.abs((values - values.mean()) @ shapes)
    strongest = int(strengths.argmax())
    asked = strengths[strongest] * (1 - 1e-9)  # the series is one of its own permutations, except for rounding
    chance, stronger, drawn = np.random.default_rng(0), 0, 0
    while drawn < _BATCH * _MOST_BATCHES and stronger < _ENOUGH_STRONGER:
        permuted = chance.permuted(np.tile(values - values.mean(), (_BATCH, 1)), axis=1)
        stronger += int((np.abs(permuted @ shapes).max(1) >= asked).sum())
        drawn += _BATCH
    return strongest, (1 + stronger) / (1 + drawn)


def _sizes(values: np.ndarray, changes: Sequence[tuple[int, int]]) -> list[Estimate]:
    """Return the ratio of speeds over each change, from least squares on all changes together."""
    if not changes:
        return []
    count = len(values)
    ramps = np.stack([_ramp(count, start, end) for start, end in changes], axis=1)
    centred = values - values.mean()
    logs, *_ = np.linalg.lstsq(ramps - ramps.mean(0), centred, rcond=None)
    freedom = count - 1 - 3 * len(changes)  # each change's size and two places were fitted
    sizes = []
    for number, log in enumerate(logs):
        others = np.where(np.arange(len(changes)) == number, 0.0, logs)
        low, high = _interval(centred - (ramps - ramps.mean(0)) @ others, freedom)
        sizes.append(Estimate(math.exp(log), math.exp(min(low, log)), math.exp(max(high, log))))
    return sizes


def _interval(values: np.ndarray, freedom: int) -> tuple[float, float]:
    """Return the least and greatest size, in logarithms, of changes that fit a series nearly as well as the best fit.

    The changes may be at any place. This profiles the likelihood over the places: an interval at the chosen place alone
    would be too narrow.
    """
    if freedom < 1:
        return -math.inf, math.inf
    ramps = np.stack([_ramp(len(values), *place) for place in combinations(range(len(values)), 2)], axis=1)
    ramps -= ramps.mean(0)
    lengths = (ramps**2).sum(0)
    logs = values @ ramps / lengths
    left = (values**2).sum() - logs**2 * lengths
    bound = left.min() * (1 + student_t((1 + COVERAGE) / 2, freedom) ** 2 / freedom)
    near = left <= bound
    halves = np.sqrt((bound - left[near]) / lengths[near])
    return float((logs[near] - halves).min()), float((logs[near] + halves).max())
