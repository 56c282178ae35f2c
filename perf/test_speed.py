"""Speed of every arm of the preset: `pytest --benchmark`."""

import pytest

from specdecode.bench.replay import clock, replay
from specdecode.bench.runs import extra_info


@pytest.mark.benchmark(timer=clock, group="speed")
def test_speed(arm, results, benchmark):
    """The arm's output is the baseline's, token by token; its times are played to pytest-benchmark."""
    runs = results.runs[arm]
    benchmark.extra_info.update(extra_info(results, arm))
    replay(benchmark, [measured.run.total_s for measured in runs])
    wrong = [measured.prompt for measured in runs if measured.check == "bug"]
    assert not wrong, f"{arm} gave other tokens than autoregressive decoding on {', '.join(wrong)}: its times are void"
