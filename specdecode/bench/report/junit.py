"""Write measures and verdicts into JUnit's XML, where CI systems show and trend them."""

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
    """Add properties to a test's entry in the file of --junitxml, but for those that are None or not finite.

    With junit_family=xunit2, pytest's default, the test's entry must not have properties. Then they are the suite's,
    and their names begin with the test's.
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
    """Return a verdict as properties. A blamed cause is the relative change of the time per token that is due to it."""
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
        check: of the margin.
        cost: that was judged, in the measure's unit; None where there was nothing to judge.
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
