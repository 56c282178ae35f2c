"""Changes of an arm between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.run import Run
from specdecode.bench.gate.pairs import changes
from specdecode.bench.gate.verdicts import Verdict, judge
from specdecode.bench.measure.block import Block
from specdecode.bench.measure.experiment import Results
from specdecode.bench.runs.counts import Counts
from specdecode.bench.runs.records import RunFile
from tests.helpers.speed_runs import run_of_results


def measured(repeats: Sequence[int]) -> RunFile:
    """Return a run of three repeats, in some of which `drafting` is twice as fast as its reference arm, `engine`. That
    becomes slower from repeat to repeat.
    """

    def never(*arguments: object) -> Run:
        raise AssertionError

    blocks = []
    for repeat in range(3):
        seconds = {"ar": 1.0, "engine": 2.0**repeat}
        if repeat in repeats:
            seconds["drafting"] = seconds["engine"] / 2
        runs = {arm: Run([7] * 4, total_s, 0.1, Counts(steps=4)) for arm, total_s in seconds.items()}
        last = {arm: runs[arm] for arm in ("ar", "engine")}
        blocks.append(Block("p", repeat, runs, last, dict.fromkeys(runs, "equal")))
    arms = [Arm("ar", never, None), Arm("engine", never, None), Arm("drafting", never, None, baseline="engine")]
    return run_of_results(Results(arms, blocks, {}), 4)


def test_repeats_are_paired_by_their_number() -> None:
    """Guards against a time divided by one of another repeat: with `--until` an arm may skip repeats in which its
    reference arm runs for others.
    """
    new, old = measured([0, 2]), measured([0, 1, 2])
    assert changes("drafting", new, old, "engine") == pytest.approx([0.0, 0.0], abs=1e-9)
    assert new.arms["drafting"].rows["p"].repeat_numbers == [0, 2]
    assert old.arms["drafting"].rows["p"].repeat_numbers == []


def test_an_arm_without_a_repeat_of_its_reference_arm_has_no_times() -> None:
    """Guards against a verdict, with its blame, on a change that is not a number."""
    new, old = measured([0, 1, 2]), measured([0, 1, 2])
    row = new.arms["drafting"].rows["p"]
    new.arms["drafting"].rows["p"] = replace(row, repeat_numbers=[3, 4, 5])
    (judged,) = (one for one in judge(new, old) if (one.arm, one.gate) == ("drafting", "time"))
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert judged.reason.startswith("run and baseline share no times over engine")
    assert judged.blame is None
