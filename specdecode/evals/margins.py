"""Margins of quality: how much an arm may cost, and tests of non-inferiority against that."""

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
    """What a test of non-inferiority says."""

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
    """Whether an arm keeps a margin.

    Attributes:
        arm: its name.
        measure: one of JUDGED.
        outcome: of the test; None where there is no margin, or nothing to test.
        expected: FAIL of a negative control, PASS of all others.
        reason: one sentence with the figures.
    """

    arm: str
    measure: str
    outcome: Outcome | None
    expected: Outcome
    reason: str

    @property
    def unexpected(self) -> bool:
        """A lossy part is beyond its margin, or a negative control within it; or it was measured too coarsely."""
        return self.outcome not in (None, self.expected)


def check_margins(run: QualityRun, margins: Mapping[str, Mapping[str, float]]) -> list[MarginCheck]:
    """Test every arm and measure for non-inferiority.

    A negative control is tested by the margin of the arm that it names, and has to fail: a measurement in which it
    passes could not have seen a fault of that arm either.

    Args:
        run: that is tested.
        margins: for each arm, how much more than the reference it may cost by each measure: in nats a token, or as a
            share of a task's problems.
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
        return None, "not read: INT8 needs torchao"
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
    reason = f"{figures}, {limit}; what can be told from none begins at {detectable(cost):.4f}"
    return None if margin is None else non_inferior(cost, margin), reason


# A margin is above nought.
_LEAST_MARGIN = 1e-9


def read_margins(path: Path) -> dict[str, dict[str, float]]:
    """Read the margins of a file, by arm and measure; none, if there is no such file.

    Raises:
        ValueError: it is damaged, or has margins of something else.
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
        raise ValueError(f"{path} has a margin that cannot be: {error}") from None


def _margins(limits: dict[str, Any]) -> dict[str, float]:
    if unknown := sorted(limits.keys() - JUDGED.keys()):
        raise ValueError(f"{unknown[0]!r} is not judged: choose from {', '.join(JUDGED)}")
    return {measure: number(limits, measure, _LEAST_MARGIN) for measure in limits}
