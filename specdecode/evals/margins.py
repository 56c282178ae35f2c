"""Margins of quality: the cost that each arm may have, and tests of non-inferiority against it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdecode.bench.runs.statistics import Estimate, detectable
from specdecode.evals.results import JUDGED, MEASURES, QualityRun
from specdecode.evals.tasks import TASKS
from specdecode.support.checked import mapping, number, read_json


class Outcome(str, enum.Enum):
    """The outcome of a test of non-inferiority."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


def non_inferior(cost: Estimate, margin: float) -> Outcome:
    """Test whether a cost stays within its margin.

    Returns:
        PASS if the whole interval lies within the margin, FAIL if none of it does, and INCONCLUSIVE otherwise.
    """
    if cost.high <= margin:
        return Outcome.PASS
    return Outcome.FAIL if cost.low > margin else Outcome.INCONCLUSIVE


@dataclass(frozen=True, slots=True)
class MarginCheck:
    """The test of one arm against one margin.

    Attributes:
        arm: name of the arm.
        measure: one of JUDGED.
        outcome: outcome of the test; None if there is no margin or no measurement.
        expected: expected outcome: FAIL for a negative control, PASS for all other arms.
        reason: one sentence with the figures.
    """

    arm: str
    measure: str
    outcome: Outcome | None
    expected: Outcome
    reason: str

    @property
    def unexpected(self) -> bool:
        """Whether a lossy part exceeds its margin, a negative control keeps it, or the measurement is too coarse."""
        return self.outcome not in (None, self.expected)


def check_margins(run: QualityRun, margins: Mapping[str, Mapping[str, float]]) -> list[MarginCheck]:
    """Test every arm and measure for non-inferiority.

    A negative control is tested against the margin of the arm that it names, and must fail. If it passes, the
    measurement could not detect a fault of that arm either.

    Args:
        run: the run to test.
        margins: for each arm and measure, the largest cost relative to the reference: in nats per token, or as a share
            of a task's problems.
    """
    checks = []
    for arm, entry in run.arms.items():
        expected = Outcome.FAIL if "control" in entry else Outcome.PASS
        for measure in [*MEASURES, *run.tasks(arm)]:
            margin = margins.get(entry.get("control", arm), {}).get(measure)
            outcome, reason = _outcome(run, arm, measure, margin)
            checks.append(MarginCheck(arm, measure, outcome, expected, reason))
    return checks


def _outcome(run: QualityRun, arm: str, measure: str, margin: float | None) -> tuple[Outcome | None, str]:
    """Return the outcome of one test, and its reason."""
    if arm not in run.judged_arms:
        return None, "left out: this model or device does not support its quantised weights"
    cost, tasks = run.cost(arm, measure), run.header.tasks
    if cost is None and measure in TASKS and tasks is not None:
        return None, tasks.missing.get(measure, "no problem of it was asked")
    if cost is None:
        return None, "nothing was evicted: the texts are shorter than the cache"
    unit = "nats a token" if measure in MEASURES else "fewer solved, as a share"
    figures = f"{JUDGED[measure]} {cost:.4f} {unit}"
    if run.header.synthetic:
        return None, f"{figures}: random weights have no quality to lose"
    limit = "no margin is set" if margin is None else f"margin {margin:g}"
    reason = f"{figures}, {limit}; the least detectable cost is {detectable(cost):.4f}"
    return None if margin is None else non_inferior(cost, margin), reason


# Least margin: a margin is above 0.
_LEAST_MARGIN = 1e-9


def read_margins(path: Path) -> dict[str, dict[str, float]]:
    """Read the margins of a file, by arm and measure. Without the file there are no margins.

    Raises:
        ValueError: the file is damaged, or has a margin of an unknown measure.
    """
    if not path.exists():
        return {}
    content = read_json(path)
    margins = content.get("margins") if isinstance(content, dict) else None
    if not isinstance(margins, dict):
        raise ValueError(f"{path} has no margins: write {{arm: {{measure: margin}}}} there")
    try:
        return {arm: _margins(mapping(limits, arm)) for arm, limits in margins.items()}
    except ValueError as error:
        raise ValueError(f"{path} has an impossible margin: {error}") from None


def _margins(limits: dict[str, Any]) -> dict[str, float]:
    if unknown := sorted(limits.keys() - JUDGED.keys()):
        raise ValueError(f"{unknown[0]!r} is not judged: choose from {', '.join(JUDGED)}")
    return {measure: number(limits, measure, _LEAST_MARGIN) for measure in limits}
