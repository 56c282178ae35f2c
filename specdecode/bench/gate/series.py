"""An arm's speed in one version of a baseline after the other, and how much it moves between two by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdecode.bench.runs.names import PEER_BASELINE
from specdecode.bench.runs.records import RunFile

LEAST_EARLIER_VERSIONS = 10
"""How many earlier versions a baseline must have before they decide what an arm may lose."""

MOST_EARLIER_VERSIONS = 30
"""How many earlier versions decide at most, the newest: older ones may be of another machine room or driver."""

_IQR_FACTOR = 3.0
"""How far above the upper quartile of past changes noise may lie, in interquartile ranges."""


@dataclass(frozen=True, slots=True)
class Series:
    """An arm's speed in the versions that can be compared with the newest.

    Attributes:
        versions: their places among all that were given, the oldest first.
        logs: for each the natural logarithm of the arm's speedup over its yardstick, mean over the prompts.
    """

    versions: list[int]
    logs: list[float]


def yardstick(arm: str, run: RunFile) -> str:
    """Return what an arm's time is compared with in its own block.

    That is its baseline; for the run's baseline itself it is transformers, which our code cannot slow down.
    """
    baseline = run.baseline_of(arm)
    return PEER_BASELINE if arm == baseline else baseline


def backend(run: RunFile) -> str:
    """Return the backend that the target's forwards ran on."""
    # Older baselines know no other than transformers' own.
    return str(run.header.versions.get("backend", "eager"))


def series(arm: str, runs: Sequence[RunFile]) -> Series:
    """Collect an arm's speedups over its yardstick.

    Left out are versions of another hardware, backend or yardstick, or with other weights, prompts or lengths. So are
    those in which the arm failed or was wrong.

    Args:
        arm: its name; the newest version must have it.
        runs: versions of one baseline, the oldest first.
    """
    wanted = _conditions(arm, runs[-1])
    kept: list[int] = []
    logs: list[float] = []
    for version, run in enumerate(runs):
        if arm not in run.arms or run.arms[arm].failure or run.arms[arm].bugs or _conditions(arm, run) != wanted:
            continue
        if speedups := run.log_speedups(arm, yardstick(arm, run)):
            kept.append(version)
            logs.append(float(np.mean(list(speedups.values()))))
    return Series(kept, logs)


def _conditions(arm: str, run: RunFile) -> tuple[object, ...]:
    """Return all that must be equal for two versions' speedups of an arm to be compared."""
    over, header = yardstick(arm, run), run.header
    prompts = frozenset(run.log_speedups(arm, over))
    hardware, weights = header.identity.hardware, header.versions.get("weights")
    return over, prompts, hardware, weights, backend(run), header.max_new_tokens


def past_noise(arm: str, runs: Sequence[RunFile]) -> float:
    """Return by how much, as a share, an arm's speed changes between versions at most where only noise changes it.

    That is the upper quartile of the absolute changes between consecutive versions, and three times their interquartile
    range above it: the significance threshold of rustc-perf (docs/comparison-analysis.md in rust-lang/rustc-perf).
    A few changes that were real do not move it. Changes are taken as logarithms, so that slower and faster ones count
    alike and the share stays below 1.

    Args:
        arm: its name; the newest version must have it.
        runs: versions of one baseline, the oldest first.

    Returns:
        The share; 0 if there are fewer than `LEAST_EARLIER_VERSIONS` earlier ones to compare with.
    """
    logs = series(arm, runs).logs[-MOST_EARLIER_VERSIONS - 1 :]
    if len(logs) <= LEAST_EARLIER_VERSIONS:
        return 0.0
    lower, upper = np.quantile(np.abs(np.diff(logs)), [0.25, 0.75])
    return float(-np.expm1(-(upper + _IQR_FACTOR * (upper - lower))))
