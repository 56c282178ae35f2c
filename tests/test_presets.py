"""The presets, each rehearsed to its end on the smallest models: interrupted, resumed, and told from the file alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from specdecode.bench import session
from specdecode.bench.baselines import parse, run_json
from specdecode.bench.history import History
from specdecode.bench.measure import Block
from specdecode.bench.page import document, section
from specdecode.bench.presets import preset
from specdecode.bench.report import latex, markdown, title
from specdecode.bench.session import Options, measure

PRESETS = ("quick", "full", "comprehensive", "long-sequence", "sweep", "int8", "streaming")


def options(name: str, root: Path, **given: object) -> Options:
    off = dict.fromkeys(("resume", "eos"), False)
    chosen = {"root": root, "preset": name, "target": "smollm2-135m", "device": "cpu", "backend": "eager", "tiny": True}
    return Options(**{field.name: None for field in fields(Options)} | off | chosen | given)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_interrupted_resumed_and_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a grid that fails after an hour, forgets what it had, or that the report cannot tell."""
    asked = options(name, tmp_path)
    arms = set(asked.experiment.arms)
    opened = session.open_journal

    def interrupting(*arguments: object) -> object:
        finished, keep = opened(*arguments)

        def kept(block: Block) -> None:
            keep(block)
            raise KeyboardInterrupt

        return finished, kept

    with monkeypatch.context() as planted:
        planted.setattr(session, "open_journal", interrupting)
        with pytest.raises(KeyboardInterrupt):
            measure(asked, arms)
    first = json.loads(asked.journal.read_text().splitlines()[1])
    bench = measure(options(name, tmp_path, resume=True), arms)
    assert not any(bench.wrong.values())
    (prompt, *_) = bench.run.header.outputs
    assert first["prompt"] == prompt
    # It was not measured again.
    assert bench.run.arms["ar"].rows[prompt].seconds["total"] == first["runs"]["ar"]["total_s"]

    text = json.dumps({"specdecode": run_json(bench.run), "datetime": "2026-01-01T00:00:00"})
    run = parse(text, Path("run.json"))
    assert set(run.arms) == arms
    assert len(run.lengths) == len(preset(name).lengths) + 1
    bounded = [arm for arm, entry in preset(name).arms.items() if "cache" in entry]
    assert not bounded or max(run.measures(arm)["compressions"] for arm in bounded) > 0
    past = History([], "none")
    for write in (markdown, latex):
        page = write(run, title(run), "not judged", [], past)
        assert all(arm in page.replace("\\_", "_") for arm in arms)
    assert "<details>" in document("runs", section(run, title(run), "not judged", [], past))
