"""Files of older versions: a run, a blessed baseline and a journal, with the older versions' verdicts on them.

`judged.json` keeps these verdicts and measures.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.gate.verdicts import judge
from specdecode.bench.measure.journal import Journal
from specdecode.bench.runs.counts import as_dict
from specdecode.bench.runs.file import parse, read, run_json
from specdecode.evals.margins import read_margins
from tests.helpers.root import ROOT

DATA = ROOT / "tests" / "data"
NAMES = ("run", "baseline")


def variants(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the run itself, a changed run, and the run as from another machine.

    In the changed run one arm is slower and accepts less, one is wrong, and one is renamed.
    """
    slower, elsewhere = copy.deepcopy(content), copy.deepcopy(content)
    arms = slower["specdecode"]["arms"]
    first, second, third = [arm for arm, record in arms.items() if arm != "ar" and record["rehearsal"]][:3]
    for row in arms[first]["rows"].values():
        row["log_speedup"] -= 0.5
        row["seconds"]["verify"] += row["seconds"]["total"] * math.expm1(0.5)
        row["seconds"]["total"] *= math.exp(0.5)
        row["counts"]["target_forwards"] += 2
        row["histograms"]["accepted"] = [sum(row["histograms"]["accepted"])]
    arms[first]["rehearsal"]["host_syncs_per_step"] += 1
    arms[second]["bugs"] = 1
    arms[f"{third}-renamed"] = arms.pop(third)
    elsewhere["specdecode"]["identity"]["hardware"] = "zx-81"
    return {"itself": content, "slower": slower, "elsewhere": elsewhere}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_before_are_judged_as_before(name: str) -> None:
    """Guards against a counter, a time or a peer of an older file that is no longer read."""
    path = DATA / f"{name}.json"
    expected = json.loads((DATA / "judged.json").read_text())[name]
    old = read(path)
    for variant, content in variants(json.loads(path.read_text())).items():
        judgements = judge(parse(json.dumps(content), path), old)
        verdicts = [[judged.arm, judged.gate, judged.verdict.value, judged.reason] for judged in judgements]
        assert verdicts == expected["verdicts"][variant], variant
    for arm in old.arms:
        assert as_dict(old.measures(arm)) == pytest.approx(expected["measures"][arm]), arm


@pytest.mark.parametrize("name", NAMES)
def test_files_of_before_are_written_again_with_all_that_they_held(name: str) -> None:
    """Guards against a key that is lost, or read under one name and written under another."""

    def holds(new: Any, old: Any) -> bool:
        if isinstance(old, dict):
            return all(key in new and holds(new[key], value) for key, value in old.items())
        return bool(new == old)

    path = DATA / f"{name}.json"
    written = json.loads(json.dumps(run_json(read(path))))
    for key, value in json.loads(path.read_text())["specdecode"].items():
        assert key == "reason" or holds(written[key], value), key


def test_whose_an_arm_of_before_was_is_told_by_what_was_counted() -> None:
    """Guards against transformers' arms gated like ours because an older file does not mark them."""
    for name in NAMES:
        arms = read(DATA / f"{name}.json").arms
        assert {arm for arm, record in arms.items() if record.peer} == {arm for arm in arms if arm.startswith("hf")}


def test_a_journal_of_before_is_gone_on_with(tmp_path: Path) -> None:
    """Guards against an interrupted run of hours that a new version cannot resume."""
    text = (DATA / "blocks.jsonl").read_text()
    file = tmp_path / "blocks.jsonl"
    file.write_text(text)
    values, kept = map(json.loads, text.splitlines())
    journal = Journal(file, values, resume=True)
    (block,) = journal.blocks()
    assert block.checks == kept["checks"]
    assert list(block.runs) == list(kept["runs"])
    assert block.runs["lookup-16"].counts.compressions == kept["runs"]["lookup-16"]["counts"]["compressions"] > 0
    assert block.runs["lookup-16"].seconds.later_verify == kept["runs"]["lookup-16"]["seconds"]["later_verify"]
    assert block.runs["ar"].histograms.depth == kept["runs"]["ar"]["histograms"]["depth"]
    assert block.runs["hf-generate"].counts.target_forwards is None
    assert [cut.counts.steps for cut in block.runs["hf-generate"].cuts] == [4]
    journal.add_block(block, {})
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == [kept, kept]


def test_margins_of_before_are_read() -> None:
    """Guards against a quality baseline that a new version can no longer read."""
    for file in (ROOT / "baselines" / "quality").glob("*.json"):
        assert read_margins(file)["sink-window-256"]["nll"] == 0.3
