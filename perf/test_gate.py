"""The verdicts on every arm of the preset and of the baseline: `pytest --benchmark --gate=on|off|strict`."""

import pytest

from specdecode.bench.gate.verdicts import FAILING, Judgement, Verdict
from specdecode.bench.report.junit import record_properties, verdict_properties


def test_gate(judged, speed_run, plan, request):
    """Guards against a slower arm and against worse counters, compared with the baseline's file or another commit.

    An arm that is not judged is skipped.
    """
    unjudged = Judgement(
        *judged, Verdict.NO_BASELINE, "no baseline has these models, this type and this preset: bless a run"
    )
    by_name = {(judgement.arm, judgement.gate): judgement for judgement in speed_run.judgements}
    judgement = by_name.get(judged, unjudged)
    record_properties(request, verdict_properties(judgement))
    if judgement.verdict is Verdict.NOT_JUDGED:
        pytest.skip(judgement.reason)
    if judgement.verdict in FAILING[plan.gate]:
        pytest.fail(f"{judgement.verdict.value}: {' '.join(judged)}: {judgement.reason}", pytrace=False)
