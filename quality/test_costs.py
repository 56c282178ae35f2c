"""The cost of every lossy part of the preset, checked against its margin: `pytest --quality`."""

import pytest

from specdecode.bench.report.junit import quality_properties, record_properties
from specdecode.evals.margins import Outcome


def test_cost(cost, quality_run, request):
    """Guards against a cost whose interval is not within its margin, and a negative control that is not beyond it."""
    check = next(check for check in quality_run.checks if (check.arm, check.measure) == cost)
    judged = quality_run.run.cost(*cost) if check.outcome else None
    record_properties(request, quality_properties(check, judged))
    if check.outcome is None:
        pytest.skip(check.reason)
    if check.unexpected:
        wanted = "has to fail, as a negative control" if check.expected is Outcome.FAIL else "has to pass"
        pytest.fail(f"{' '.join(cost)} {wanted}, and is {check.outcome.value}: {check.reason}", pytrace=False)
