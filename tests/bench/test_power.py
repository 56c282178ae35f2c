"""Verdicts of the gate on recorded machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perf.power import Compared, by_baseline, side_by_side, until_decided, verdict
from perf.traces import Trace
from specdecode.bench.gate.verdicts import Verdict
from specdecode.bench.runs.statistics import detectable_slowdown, typical_ratio

TRACES = {file.stem: Trace.read(file) for file in sorted((Path(__file__).parents[1] / "data" / "traces").glob("*.npz"))}
COUNT = 60

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("machine", TRACES)
@pytest.mark.parametrize(("simulate", "others", "blocks"), [(by_baseline, 4, 12), (side_by_side, 1, 12)])
def test_equal_code_is_not_convicted(machine: str, simulate: Callable[..., Compared], others: int, blocks: int) -> None:
    """Guards against a gate that fails because other work took the processor."""
    changes = [typical_ratio(*simulate(TRACES[machine], seed, others, blocks, 0.0)) for seed in range(COUNT)]
    covered = sum(change.low <= 1 <= change.high for change in changes) / COUNT
    assert covered > 0.95 - 3 * (0.95 * 0.05 / COUNT) ** 0.5
    assert not [change for change in changes if verdict(change, 0.02) is Verdict.REGRESSED]


def test_measuring_again_narrows_what_a_neighbour_widens() -> None:
    """Guards against repeats that cost time and do not narrow the interval."""
    trace = TRACES["epyc-neighbour"]

    def width(again: float) -> float:
        changes = [typical_ratio(*by_baseline(trace, seed, 1, 12, 0.0, again)) for seed in range(COUNT)]
        return float(np.median([change.high / change.low - 1 for change in changes]))

    assert width(again=1.0) < 0.7 * width(again=0.0)


@pytest.mark.parametrize("machine", TRACES)
def test_a_few_minutes_side_by_side_see_five_percent(machine: str) -> None:
    """Guards against versions that take turns too seldom for a noisy machine."""
    changes = [typical_ratio(*side_by_side(TRACES[machine], seed, 0, 12, 0.05)) for seed in range(COUNT)]
    assert sum(verdict(change, 0.02) is Verdict.REGRESSED for change in changes) / COUNT > 0.8


@pytest.mark.parametrize("machine", TRACES)
def test_a_slowdown_is_seen_from_where_it_says(machine: str) -> None:
    """Guards against a stated detectable slowdown that the gate misses on a real machine."""
    trace = TRACES[machine]
    # 20 blocks are not longer than a recording. It would repeat itself, and its noise would not average out.
    equal = [typical_ratio(*side_by_side(trace, seed, 0, 20, 0.0)) for seed in range(COUNT)]
    promised = float(np.median([detectable_slowdown(change, 0.02) for change in equal]))
    changes = [typical_ratio(*side_by_side(trace, seed, 0, 20, promised / (1 - promised))) for seed in range(COUNT)]
    seen = sum(verdict(change, 0.02) is Verdict.REGRESSED for change in changes) / COUNT
    assert seen > 0.9 - 3 * (0.9 * 0.1 / COUNT) ** 0.5


@pytest.mark.parametrize(("slower", "least", "most"), [(0.0, 0, 0), (0.05, 8, 10)])
def test_a_session_that_goes_on_until_it_is_decided_sees_five_percent(slower: float, least: int, most: int) -> None:
    """Guards against looks that cost so much that ten minutes are too short beside a neighbour."""
    verdicts = [until_decided(TRACES["epyc-neighbour"], seed, slower, 0.05, 0.02)[0] for seed in range(10)]
    assert least <= verdicts.count(Verdict.REGRESSED) <= most
