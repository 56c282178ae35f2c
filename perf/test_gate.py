"""The verdict on every arm of the preset and of the baseline: `pytest --benchmark --gate=on|off|strict`."""

import pytest

from specdecode.bench.gate.verdicts import FAILING, Verdict


def test_gate(judged, speed_run, plan):
    """The arm is no slower than its baseline, and its counters are no worse. What is not judged is skipped."""
    verdict, reason = Verdict.NO_BASELINE, "there is no baseline for this hardware"
    for judgement in speed_run.judgements:
        if (judgement.arm, judgement.gate) == judged:
            verdict, reason = judgement.verdict, judgement.reason
    if verdict is Verdict.NOT_JUDGED:
        pytest.skip(reason)
    if verdict in FAILING[plan.gate]:
        pytest.fail(f"{verdict.value}: {' '.join(judged)}: {reason}", pytrace=False)
