"""The speed of every arm of the preset: `pytest --benchmark`."""

import pytest

from specdecode.bench.measure.replay import clock, replay
from specdecode.bench.report.junit import record_properties
from specdecode.bench.runs.counts import as_dict


@pytest.mark.benchmark(timer=clock, group="speed")
def test_speed(arm, speed_run, benchmark, request):
    """Guards against times of a wrong output. The arm's times are replayed through pytest-benchmark."""
    if arm in speed_run.run.arms and (failure := speed_run.run.arms[arm].failure):
        pytest.fail(failure, pytrace=False)
    if not speed_run.durations.get(arm):
        pytest.skip("the commit to compare with lacks this arm or cannot decode it: see the verdicts")
    measures = as_dict(speed_run.run.measures(arm))
    benchmark.extra_info.update(measures)
    record_properties(request, measures)
    replay(benchmark, speed_run.durations[arm])
    wrong = speed_run.wrong[arm]
    baseline = speed_run.run.baseline_of(arm)
    than = baseline if arm != baseline else "in its first run"
    assert not wrong, f"{arm} gave other tokens than {than} on {', '.join(wrong)}: its times are void"
