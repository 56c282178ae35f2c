"""An arm's speed over the versions of a baseline, and its noise between consecutive versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdecode.bench.runs.names import PEER_BASELINE
from specdecode.bench.runs.records import RunFile

LEAST_EARLIER_VERSIONS = 10
"""Least number of earlier versions before their noise decides an arm's tolerance."""

MOST_EARLIER_VERSIONS = 30
"""Largest number of earlier versions that decide, the newest: older ones may have another machine room or driver."""

_IQR_FACTOR = 3.0
"""Distance of the noise bound from the upper quartile of past changes, in interquartile ranges."""


@dataclass(frozen=True, slots=True)
class Series:
    """An arm's speed in the versions that can be compared with the newest version.

    Attributes:
        versions: indices of these versions in the given sequence, the oldest first.
        logs: natural logarithm of the arm's speedup over its yardstick in each version, mean over the prompts.
    """

    versions: list[int]
    logs: list[float]


def yardstick(arm: str, run: RunFile) -> str:
    """Return the arm that an arm's time is compared with in its own block.

    That is its reference arm. For a reference arm itself it is transformers, which our code cannot slow down.
    """
    baseline = run.baseline_of(arm)
    return PEER_BASELINE if arm == baseline else baseline


def backend(run: RunFile) -> str:
    """Return the backend of the target's forwards."""
    # Older baselines do not name it: all of them used transformers' own forward.
    return str(run.header.versions.get("backend", "eager"))


def turns(run: RunFile) -> str:
    """Return what took turns in a run: "steps" of an arm and its reference arm, "versions" of the code, or "" if whole
    runs were compared."""
    kind = str(run.header.versions.get("turns", ""))
    return kind if kind in ("steps", "versions") else ""


def series(arm: str, runs: Sequence[RunFile]) -> Series:
    """Collect an arm's speedups over its yardstick.

    Versions with another hardware, backend, yardstick, weights, prompts or length are left out. So are versions in
    which the arm failed or had a wrong output.

    Args:
        arm: name of the arm; the newest version must have it.
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
    """Return the properties that must be equal in two versions to compare their speedups of an arm."""
    over, header = yardstick(arm, run), run.header
    prompts = frozenset(run.log_speedups(arm, over))
    hardware, weights = header.identity.hardware, header.versions.get("weights")
    return over, prompts, hardware, weights, backend(run), turns(run), header.max_new_tokens


def past_noise(arm: str, runs: Sequence[RunFile]) -> float:
    """Return the largest change of an arm's speed between versions that noise alone explains, as a share.

    That is the upper quartile of the absolute changes between consecutive versions, plus three times their
    interquartile range: the significance threshold of rustc-perf (docs/comparison-analysis.md in rust-lang/rustc-perf).
    A few real changes do not move it. Changes are logarithms, so that slower and faster versions count alike and the
    share stays below 1.

    Args:
        arm: name of the arm; the newest version must have it.
        runs: versions of one baseline, the oldest first.

    Returns:
        The share; 0 with fewer than `LEAST_EARLIER_VERSIONS` comparable earlier versions.
    """
    logs = series(arm, runs).logs[-MOST_EARLIER_VERSIONS - 1 :]
    if len(logs) <= LEAST_EARLIER_VERSIONS:
        return 0.0
    lower, upper = np.quantile(np.abs(np.diff(logs)), [0.25, 0.75])
    return float(-np.expm1(-(upper + _IQR_FACTOR * (upper - lower))))
