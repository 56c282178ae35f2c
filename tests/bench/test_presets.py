"""The presets, each rehearsed to its end on the smallest models and reported from the file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.gate.history import History
from specdecode.bench.measure import speed_session
from specdecode.bench.measure.block import Block
from specdecode.bench.measure.journal import Journal
from specdecode.bench.measure.speed_session import measure
from specdecode.bench.options import Options
from specdecode.bench.plan import Plan, resolve
from specdecode.bench.presets import built_in, preset
from specdecode.bench.report.captions import title
from specdecode.bench.report.elements import document
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex
from specdecode.bench.report.markdown import markdown
from specdecode.bench.runs.file import parse, run_json

PRESETS = ("full", "comprehensive", "long-sequence", "sweep", "int8", "streaming")


def plan(name: str, root: Path, **given: Any) -> Plan:
    return resolve(Options(**{"root": root, "preset": name, "device": "cpu", "backend": "eager", "tiny": True} | given))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_to_its_end_and_is_told(name: str, tmp_path: Path) -> None:
    """Guards against a grid that fails after an hour, or that the report cannot show."""
    asked = plan(name, tmp_path)
    arms = set(asked.preset.arms)
    judged = measure(asked, arms)
    assert not any(judged.wrong.values())

    text = json.dumps({"specdecode": run_json(judged.run), "datetime": "2026-01-01T00:00:00"})
    run = parse(text, Path("run.json"))
    assert set(run.arms) == arms
    assert len(run.lengths) == len(preset(name).lengths) + 1
    bounded = [arm for arm, entry in preset(name).arms.items() if "cache" in entry]
    assert not bounded or max(run.measures(arm).counters.compressions for arm in bounded) > 0
    past = History([], "none")
    for write in (markdown, latex):
        page = write(run, title(run), "not judged", [], past)
        assert all(arm in page.replace("\\_", "_") for arm in arms)
    assert "<details>" in document("runs", section(run, title(run), "not judged", [], past))


@pytest.mark.parametrize("name", [name for name in built_in() if "gpu" in name or name == "synthetic"])
def test_random_weights_draft_at_a_set_acceptance(name: str) -> None:
    """Guards against drafts of random weights, of which the target accepts none or all: their times say nothing."""
    drafters = {"model", "head"}
    drafting = [entry for entry in preset(name).arms.values() if entry.get("drafter") in drafters]
    assert drafting
    assert all(0 < entry.get("replay", 0) < 1 for entry in drafting)


@pytest.mark.usefixtures("unchecked")
def test_a_preset_of_lengths_and_caches_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an interruption that loses the earlier measurements."""
    arms = {"ar", "ar-128", "linear-k3"}
    asked = plan("sweep", tmp_path)

    class Interrupting(Journal):
        def add_block(self, block: Block, failures: Mapping[str, str]) -> None:
            super().add_block(block, failures)
            raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(speed_session, "Journal", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            measure(asked, arms)
    first = json.loads(asked.journal.read_text().splitlines()[1])
    run = measure(plan("sweep", tmp_path, resume=True), arms).run
    assert set(run.arms) == arms
    assert len(run.header.outputs) == 2
    rows = {arm: record.rows[first["prompt"]] for arm, record in run.arms.items()}
    assert {arm: row.seconds.total for arm, row in rows.items()} == {
        arm: run["total_s"] for arm, run in first["runs"].items()
    }
