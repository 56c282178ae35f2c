"""The explanations of columns, below the tables of every format."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement, Verdict, judge
from specdecode.bench.measure.speed_session import JudgedRun
from specdecode.bench.quality import quality_tables
from specdecode.bench.quality.quality_page import section as quality_section
from specdecode.bench.quality.tradeoff import against_speed
from specdecode.bench.report.captions import CELLS, COLUMNS, notes
from specdecode.bench.report.comment import comment
from specdecode.bench.report.elements import Element, document
from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex
from specdecode.bench.report.markdown import markdown
from specdecode.bench.report.tables import (
    acceptance,
    by_model,
    by_part,
    limits,
    memory,
    past_speedups,
    speeds,
    verdicts,
)
from specdecode.bench.report.terminal import console_text
from specdecode.bench.runs.file import parse
from specdecode.bench.runs.records import RunFile
from specdecode.bench.summary import speed_text
from specdecode.evals.margins import check_margins
from tests.helpers.pages import MOST_LINES, Page
from tests.helpers.quality_runs import whole_quality_run, whole_speeds
from tests.helpers.run_contents import SPEEDUPS, run_content, scored_run
from tests.helpers.speed_runs import ARMS, speed_arm, speed_run, sweep, whole_sweep

PAST = History([], "none")


def texts(run: RunFile, judgements: Sequence[Judgement] = (), past: History = PAST) -> dict[str, str]:
    """Return a run in every format that explains columns, as plain text."""
    judged = JudgedRun("title", ["here"], run, {}, {}, "by", list(judgements))
    return {
        "markdown": from_markdown(markdown(run, "title", "by", judgements, past)),
        "html": from_html(section(run, "title", "by", judgements, past)),
        "latex": from_latex(latex(run, "title", "by", judgements)),
        "terminal": " ".join(speed_text(judged, False, "utf-8").split()),
    }


def from_markdown(text: str) -> str:
    return re.sub(r"\\([|*`])", r"\1", text).replace("&lt;", "<")


def from_html(elements: list[Element]) -> str:
    return Page(document("title", elements).replace("</dt><dd>", ": ")).text


def from_latex(text: str) -> str:
    text = text.replace("$\\tau$", "τ").replace("$\\Delta$", "Δ").replace("\\%", "%").replace("\\_", "_")
    return text.replace("\\textbar{}", "|").replace("\\textgreater{}", ">")


def test_brackets_in_a_reason_are_text() -> None:
    """Guards against a blessing whose reason ends every later session with a traceback, or loses a word."""
    judged = JudgedRun("title [/INST]", ["[b]here"], scored_run(SPEEDUPS), {}, {}, "by [ci] a runner [/INST]", [])
    shown = speed_text(judged, False, "utf-8")
    for written in ("title [/INST]", "[b]here", "by [ci] a runner [/INST]"):
        assert written in shown


def test_a_table_explains_the_columns_that_it_has() -> None:
    """Guards against an explanation of a column that is missing or empty, and a column without its explanation."""
    columns = [Column("a", about="one"), Column("b", about="two"), Column("c"), Column("d", about="four")]
    grid = Grid(columns, [["1", "", "3", ""], ["", "", "3", "4"]])
    assert grid.explanations == "a: one. d: four."
    assert Grid(columns, []).explanations == ""
    assert CELLS.keys() - COLUMNS.keys() == {"agreement"}  # a part of the column "output"
    assert all(column.about for column in COLUMNS.values())


def test_every_format_explains_the_speeds_below_them() -> None:
    """Guards against a format that leaves a column to be guessed, and explanations above the table."""
    run = scored_run(SPEEDUPS)
    explained = speeds(run).explained
    assert [column.name for column in explained] == [
        *("tokens/s", "speedup over ar", "over hf-generate", "predicted", "TTFT ms", "TPOT ms", "τ", "accepted"),
        *("roofline", "self PPL", "repeats", "output"),
    ]
    for format_, text in texts(run).items():
        for column in explained:
            assert f"{column.name}: {column.about}" in text, (format_, column.name)
        if format_ != "latex":  # there, captions stand above
            assert text.index("hf-assisted") < text.index(f"predicted: {COLUMNS['predicted_speedup'].about}")


@pytest.mark.parametrize("format_", ["markdown", "html", "latex"])
def test_each_table_explains_each_column_once(format_: str) -> None:
    """Guards against sentences that the notes repeat."""
    run = whole_sweep()
    text = texts(run)[format_]
    grids = [grid(run) for grid in (speeds, by_part, by_model, memory)]
    grids += [] if format_ == "latex" else [limits(run)]
    grids += [] if format_ == "html" else [acceptance(run)]  # drawn there
    for column in {column for grid in grids for column in grid.explained}:
        tables = sum(column in grid.explained for grid in grids)
        assert text.count(f"{column.name}: {column.about}") == tables, column.name
    assert {"KV MB", "evictions"} <= {column.name for column in by_part(run).explained}


def test_verdicts_and_the_history_are_explained() -> None:
    """Guards against verdicts, and past speedups, with headings that a reader has to guess."""
    run = scored_run(SPEEDUPS)
    judgements = judge(run, run)
    judged = texts(run, judgements, History([run], "one version"))
    written = from_markdown(comment(run, "title", "by", judgements, "strict"))
    assert {"verdict", "of", "why"} == {column.name for column in verdicts(judgements).explained}
    for column in verdicts(judgements).explained:
        told = [format_ for format_, text in judged.items() if f"{column.name}: {column.about}" in text]
        assert told == ["markdown", "latex", "terminal"]  # the HTML page lists verdicts
    for column in past_speedups(run, History([run], "one version")).explained:
        told = [format_ for format_, text in judged.items() if f"{column.name}: {column.about}" in text]
        assert told == ["markdown", "html"]
    assert "tokens/s: " in written
    assert "why: " not in written  # no verdict fails: there is no such table
    failing = comment(run, "title", "by", [replace(judgements[0], verdict=Verdict.REGRESSED)])
    assert "why: " in failing


def test_each_table_of_quality_explains_each_column_once() -> None:
    """Guards against an abbreviation that only the notes of one format explain."""
    run, speed = whole_quality_run(), whole_speeds()
    checks = check_margins(run, {"sink-window-8": {"nll": 0.01}, "int8": {"nll": 0.5}})
    written = {
        "markdown": from_markdown(quality_tables.markdown(run, checks, speed)),
        "html": from_html(quality_section(run, checks, speed)),
        "latex": from_latex(quality_tables.latex(run, checks, speed)),
    }
    grids = [quality_tables.costs(run, checks), quality_tables.scores(run, checks), quality_tables.retrieval(run)]
    grids += [against_speed(run, speed), quality_tables.margins(checks)]
    assert [len(grid.explained) for grid in grids] == [8, 6, 2, 5, 2]
    for column in {column for grid in grids for column in grid.explained}:
        for format_, text in written.items():
            tables = sum(column in grid.explained for grid in grids)
            tables += format_ == "html" and column in grids[-1].explained  # unexpected verdicts stand apart
            assert text.count(f"{column.name}: {column.about}") == tables, (format_, column.name)


def test_what_a_run_lacks_is_not_explained() -> None:
    """Guards against a paragraph about columns that no table has."""
    run = sweep({"ar": {}, "ar-64": ARMS["ar-64"]})
    for text in texts(run).values():
        for name in ("over hf-generate", "self PPL", "roofline", "growth MB"):
            assert f"{name}: " not in text


def test_the_output_is_explained_in_the_words_of_its_cells() -> None:
    """Guards against a word of the table that is not explained, and an explained word that is not there."""
    lossy = speeds(scored_run(SPEEDUPS)).columns[-1].about
    words = ("equal", "ties", "lossy", "loops", "WRONG", "FAILED")
    assert [word for word in words if f"{word} (" in lossy] == ["equal", "lossy"]
    assert "loops (" in speeds(whole_sweep()).columns[-1].about
    wrong = parse(json.dumps(run_content(SPEEDUPS, bugs=1)), Path("run.json"))
    assert "WRONG (" in speeds(wrong).columns[-1].about


@pytest.mark.parametrize(("fault", "word"), [({"bugs": 1}, "WRONG"), ({"failure": "it died"}, "FAILED")])
def test_void_times_are_marked_in_every_table_and_in_no_note(fault: dict[str, Any], word: str) -> None:
    """Guards against a fast time of a wrong output in a table that does not say so."""
    old = whole_sweep()
    run = replace(old, arms=old.arms | {arm: replace(old.arms[arm], **fault) for arm in ("linear-k4", "hf-assisted")})
    assert {row[3] for row in by_part(run).rows if row[3].startswith("linear-k4")} == {f"linear-k4, {word}"}
    assert f"linear-k4, {word}" in {row[0] for row in limits(run).rows}
    assert by_model(run).rows == []
    past = History([old], "one version")
    place = list(run.arms).index("linear-k4") - len(run.arms)
    assert [row[place] for row in past_speedups(run, past).rows] == [f"{old.speedup('linear-k4')}", word]
    page = document("title", section(run, "title", "by", [], past))
    (course,) = re.findall("Speedup of linear-k4 over ar, run by run</title><desc>(.*?)</desc>", page)
    assert course.count("[") == 1
    assert "linear-k2 over hf-assisted" in " ".join(notes(old))
    assert "over hf-assisted" not in " ".join(notes(run))


def test_names_in_headings_are_text() -> None:
    """Guards against an arm whose name ends `specdecode history`, or loses its brackets."""
    grid = Grid([Column("lookup[fast] over ar"), Column("[/x] over ar", breaks=True)], [["1.00", "2.00"]])
    text = console_text(lambda console: console.print(rich_table(grid)), False, "utf-8")
    assert "lookup[fast] over ar" in text
    assert "[/x] over ar" in text


def test_a_terminal_has_one_paragraph_and_a_comment_explains_its_few_columns() -> None:
    """Guards against a table lost in text, and a comment with no room left for verdicts."""
    run = scored_run(SPEEDUPS)
    assert len(notes(run)) < 6
    assert "\n" not in speeds(run).explanations
    assert len(speeds(run).explanations) < 1500
    text = comment(run, "title", "by", [])
    assert "predicted: " not in text
    assert text.count("\n") <= MOST_LINES


def test_a_terminal_shows_every_figure_whole() -> None:
    """Guards against figures without their end in a wide table. A long text is broken instead."""
    figures = [f"{place}{place}.{place} ± 1.0" for place in range(30)]
    columns = [Column(f"measured {place}", breaks=place % 2 == 0) for place in range(30)]
    grid = Grid([*columns, Column("why", figures=False, breaks=True)], [[*figures, "word " * 60]])
    text = console_text(lambda console: console.print(rich_table(grid)), False, "utf-8")
    assert "…" not in text
    assert all(figure in text for figure in figures[1::2])
    assert set(text.split()) >= {figure.split()[0] for figure in figures[::2]}
    assert max(line.count("word") for line in text.splitlines()) < 30


@pytest.mark.parametrize(
    ("ar", "compiled", "lookup", "said"),
    [
        (1.0, 1.3, 1.56, "The strongest plain decoding here is hf-compiled; the fastest arm, lookup, has 1.20 ["),
        (1.0, 0.9, 1.5, "The strongest plain decoding here is ar; the fastest arm, lookup, has 1.50 ["),
        (1.0, 1.3, 0.9, "The strongest plain decoding here is hf-compiled; the fastest arm, ar, has 0.77 ["),
        (1.0, 0.9, 0.8, "No other arm of this package is faster than ar."),
        (1.0, None, 1.5, None),
    ],
)
def test_the_strongest_plain_decoding_is_named(
    ar: float, compiled: float | None, lookup: float, said: str | None
) -> None:
    """Guards against a speedup over a slow baseline alone, where a stronger one was measured."""
    arms = {"ar": speed_arm(ar, {}), "hf-generate": speed_arm(0.8, {"peer": "generate"}, scatter=0.0)}
    if compiled is not None:
        arms["hf-compiled"] = speed_arm(compiled, {"peer": "generate-compiled"}, scatter=0.0)
    arms["lookup"] = speed_arm(lookup, {"drafter": "lookup"}, scatter=0.0)
    arms["lossy"] = speed_arm(9.0, {"drafter": "lookup", "policy": "sink-window", "cache": 8})
    arms["wrong"] = speed_arm(9.0, {"drafter": "lookup", "k": 9}, bugs=1)
    for arm in ("hf-generate", "hf-compiled"):
        if arm in arms:
            arms[arm] = replace(arms[arm], peer=True)
    found = [one for one in notes(speed_run(**arms)) if "plain decoding here" in one or "No other" in one]
    assert [one.startswith(said) for one in found] == ([] if said is None else [True]), found
