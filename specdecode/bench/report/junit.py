"""Measures and verdicts in JUnit's XML, for the reports and trends of CI systems."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from specdecode.bench.gate.verdicts import Judgement
from specdecode.evals.margins import MarginCheck

if TYPE_CHECKING:
    import pytest

    from specdecode.bench.runs.statistics import Estimate


def record_properties(request: pytest.FixtureRequest, properties: Mapping[str, object]) -> None:
    """Add properties to a test's entry in the file of --junitxml, except those that are None or infinite.

    With junit_family=xunit2, pytest's default, a test's entry must not have properties. Then they are added to the
    suite's entry, and their names begin with the test's name.
    """
    known = [(name, value) for name, value in properties.items() if value not in (None, math.inf, -math.inf)]
    config = request.config
    if config.getoption("xmlpath", None) and config.getini("junit_family") == "xunit2":
        record = request.getfixturevalue("record_testsuite_property")
        for name, value in known:
            record(f"{request.node.name}.{name}", value)
    else:
        request.node.user_properties += known


def verdict_properties(judged: Judgement) -> dict[str, object]:
    """Return a verdict as properties. A blamed cause has the relative change of the time per token that it made."""
    causes = judged.blame.changes if judged.blame is not None else {}
    return {
        "arm": judged.arm,
        "gate": judged.gate,
        "verdict": judged.verdict.value,
        "reason": judged.reason,
        **_interval("change", judged.change),
        **{f"blame_{cause.replace(' ', '_')}": change for cause, change in causes.items()},
    }


def quality_properties(check: MarginCheck, cost: Estimate | None) -> dict[str, object]:
    """Return the outcome of a margin as properties.

    Args:
        check: the check of the margin.
        cost: the judged cost, in the unit of the measure; None if there was nothing to judge.
    """
    return {
        "arm": check.arm,
        "measure": check.measure,
        "outcome": check.outcome.value if check.outcome else "not judged",
        "expected": check.expected.value,
        "reason": check.reason,
        **_interval("cost", cost),
    }


def _interval(name: str, estimate: Estimate | None) -> dict[str, object]:
    if estimate is None:
        return {}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
