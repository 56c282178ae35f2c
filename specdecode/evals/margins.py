"""Margins of quality: how much an arm may cost, and tests of non-inferiority against that."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specdecode.bench.runs.statistics import Estimate, detectable
from specdecode.evals.results import JUDGED, MEASURES, QualityRun, read_json
from specdecode.evals.tasks import TASKS


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
        return None, tasks.missing[measure]
    if cost is None:
        return None, "nothing was evicted: the texts are shorter than the cache"
    unit = "nats a token" if measure in MEASURES else "fewer solved, as a share"
    figures = f"{JUDGED[measure]} {cost:.4f} {unit}"
    if run.header.synthetic:
        return None, f"{figures}: random weights have no quality to lose"
    limit = "no margin is set" if margin is None else f"margin {margin:g}"
    reason = f"{figures}, {limit}; what can be told from none begins at {detectable(cost):.4f}"
    return None if margin is None else non_inferior(cost, margin), reason


def read_margins(path: Path) -> dict[str, dict[str, float]]:
    """Read the margins of a file, by arm and measure; none, if there is no such file.

    Raises:
        ValueError: it is damaged, or has margins of something else.
    """
    if not path.exists():
        return {}
    margins = read_json(path).get("margins")
    if not isinstance(margins, dict):
        raise ValueError(f"{path} has no margins: write {{arm: {{measure: margin}}}} there")
    for arm, limits in margins.items():
        for measure, margin in limits.items():
            number = isinstance(margin, int | float) and not isinstance(margin, bool)
            if measure not in JUDGED or not number or not margin > 0:
                raise ValueError(
                    f"{path} sets {arm} a margin of {margin!r} for {measure!r}: it is above 0, for one of"
                    f" {', '.join(JUDGED)}"
                )
    return margins
