"""Pages that compute each measure once, however many of their tables show it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specdecode.bench.gate.history import History
from specdecode.bench.report.elements import document
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex
from specdecode.bench.report.markdown import markdown
from specdecode.bench.runs.records import ArmRecord, Row, RunFile
from specdecode.bench.runs.statistics import Estimate
from tests.helpers.speed_runs import whole_sweep


def unseen(run: RunFile) -> RunFile:
    """Return the same run with speeds of its own, so that no other page has cached its measures."""

    def moved(rows: dict[str, Row]) -> dict[str, Row]:
        return {prompt: replace(row, log_speedup=row.log_speedup + random.random()) for prompt, row in rows.items()}

    def again(record: ArmRecord) -> ArmRecord:
        shorter = {length: moved(rows) for length, rows in record.shorter.items()}
        return replace(record, rows=moved(record.rows), shorter=shorter)

    return replace(run, arms={arm: again(record) for arm, record in run.arms.items()})


@pytest.mark.parametrize("write", [markdown, latex, section])
def test_a_page_makes_each_comparison_once(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a page that bootstraps the same speedup for every table, caption and note."""
    bootstraps, asked, comparisons = 0, 0, set()
    default_rng, speedup = np.random.default_rng, RunFile.speedup

    def counted(*arguments: Any) -> Any:
        nonlocal bootstraps
        bootstraps += 1
        return default_rng(*arguments)

    def noted(part: RunFile, arm: str, over: str | None = None) -> Estimate:
        nonlocal asked
        asked += 1
        comparisons.add((arm, over or part.baseline_of(arm), tuple(part.header.outputs), part.header.max_new_tokens))
        return speedup(part, arm, over)

    monkeypatch.setattr(np.random, "default_rng", counted)
    monkeypatch.setattr(RunFile, "speedup", noted)
    page = unseen(whole_sweep())
    text = write(page, "title", "not judged", [], History([], "none"))
    assert len(text if isinstance(text, str) else document("title", text)) > 1000
    floors = len(page.tasks) * len(page.lengths)
    assert floors < bootstraps <= len(comparisons) + floors
    assert asked > 1.5 * len(comparisons)  # so caching is worth it


def test_measures_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against sums over all prompts for every cell of a table."""
    page, sums = replace(whole_sweep()), 0
    counts = ArmRecord.counts

    def counted(record: ArmRecord, *arguments: Any) -> Any:
        nonlocal sums
        sums += 1
        return counts(record, *arguments)

    first = page.measures("linear-k4")
    monkeypatch.setattr(ArmRecord, "counts", counted)
    assert page.measures("linear-k4") is first
    assert page.measures("ar").throughput
    assert sums == 0
