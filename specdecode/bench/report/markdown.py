"""A run of speeds in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement
from specdecode.bench.report.captions import command, notes, one_line
from specdecode.bench.report.grid import Grid
from specdecode.bench.report.load import by_concurrency, losses
from specdecode.bench.report.tables import details, past_speedups, speeds, surroundings, verdicts
from specdecode.bench.runs.records import RunFile


def markdown(run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], past: History) -> str:
    """Return a page with all tables: verdicts first, then speeds.

    Args:
        run: run to report.
        title: first line of the page.
        judged_by: sentence about the baseline of the verdicts.
        judgements: the verdicts.
        past: history of the baseline.
    """
    parts = [f"## {as_markdown(title)}", as_markdown(judged_by)]
    if judgements:
        parts += explained_table(verdicts(judgements))
    parts += [*explained_table(speeds(run)), "\n".join(f"- {as_markdown(note)}" for note in notes(run))]
    if (loads := by_concurrency(run)).rows:
        parts += ["### By concurrency", *explained_table(loads)]
        parts += ["\n".join(f"- {as_markdown(sentence)}" for sentence in losses(run))]
    for heading, grid in details(run).items():
        parts += [f"### {heading}", *explained_table(grid)]
    parts += ["### History", as_markdown(past.summary)]
    if past.runs:
        parts += explained_table(past_speedups(run, past))
    parts += ["### Measured with", *map(markdown_table, surroundings(run)), f"    {one_line(command(run))}"]
    return "\n\n".join(filter(None, parts)) + "\n"


def explained_table(grid: Grid) -> list[str]:
    """Return a table, and the explanations of its columns."""
    return [markdown_table(grid), as_markdown(grid.explanations)]


def markdown_table(grid: Grid) -> str:
    """Return a table in Markdown."""
    heads = [as_markdown(column.name) for column in grid.columns]
    rules = ["--:" if column.figures else "---" for column in grid.columns]
    rows = [heads, rules, *([as_markdown(cell) for cell in row] for row in grid.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_IN_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;"} | {sign: f"\\{sign}" for sign in "\\|`*"})


def as_markdown(text: str) -> str:
    """Escape a text, so that it contains no mark-up, no link and no end of a cell."""
    return one_line(text).translate(_IN_MARKDOWN).replace("](", "]\\(")
