"""A short comment for a merge request: verdicts first, then speeds."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence

from specdecode.bench.gate.verdicts import FAILING, Judgement, Verdict
from specdecode.bench.report.captions import (
    cells,
    columns,
    failing_first,
    label,
    notes,
    one_line,
    output_column,
    outputs,
    verdict_columns,
)
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.load import losses
from specdecode.bench.report.markdown import as_markdown, markdown_table
from specdecode.bench.runs.records import RunFile

_MOST_ROWS = 17
_MOST_NAMES = 5
_MOST_CHARACTERS = 600  # of a cell: GitHub refuses comments of 65 536 characters


def comment(
    run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], gate: str = "on", file: str = ""
) -> str:
    """Return a comment in Markdown: failing verdicts in full, a table of speeds, and the other verdicts in a line.

    Args:
        run: run to report.
        title: first line of the comment.
        judged_by: sentence about the baseline of the verdicts.
        judgements: the verdicts.
        gate: setting of the gate, a key of `FAILING`: it decides which verdicts fail.
        file: file of the run, for the command of the whole report; "" if it was not kept.
    """
    failing = [judged for judged in failing_first(judgements) if judged.verdict in FAILING[gate]]
    shown = failing or [judged for judged in failing_first(judgements) if judged.verdict in FAILING["on"]]
    parts = [f"## {as_markdown(title)}", _headline(run, judgements, len(failing), gate), as_markdown(judged_by)]
    if shown:
        parts.append(cut_table(_verdicts(shown), "verdicts"))
    if rest := _rest([judged for judged in judgements if judged not in shown]):
        parts.append(as_markdown(rest))
    parts.append(cut_table(_speeds(run, judgements), "arms"))
    if lost := losses(run):
        parts.append(as_markdown(f"By concurrency: {_first_of(lost)}"))
    _, floor, *_ = notes(run)
    parts.append(" ".join(map(as_markdown, [floor, *(f"Beware: {warning}." for warning in run.header.warnings)])))
    if file:
        parts.append(whole_report(file))
    return "\n\n".join(parts) + "\n"


def _verdicts(judgements: Sequence[Judgement]) -> Grid:
    """Build one row for each verdict. Equal verdicts on an arm's time and counters, with equal reasons, share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for judged in judgements:
        rows.setdefault((judged.verdict.value, judged.arm, judged.reason), []).append(judged.gate)
    return Grid(
        verdict_columns(), [[verdict, arm, ", ".join(gates), why] for (verdict, arm, why), gates in rows.items()]
    )


def cut_table(grid: Grid, what: str) -> str:
    """Return a table in Markdown with only its first rows and short cells, the number of omitted rows (`what`), and the
    explanations of its columns."""
    rows = [
        [cell if len(cell) <= _MOST_CHARACTERS else f"{cell[:_MOST_CHARACTERS]}..." for cell in map(one_line, row)]
        for row in grid.rows[:_MOST_ROWS]
    ]
    shown = Grid(grid.columns, rows)
    more = len(grid.rows) - len(rows)
    omitted = f"and {more} more {what}." if more else ""
    below = "\n".join(filter(None, [omitted, as_markdown(shown.explanations)]))
    return "\n\n".join(filter(None, [markdown_table(shown), below]))


def whole_report(file: str) -> str:
    """Return a sentence with the command that makes all tables of a run."""
    command = f"specdecode report {shlex.quote(' '.join(file.splitlines()))} --format html"
    # A fence of backticks must be longer than those in the path.
    fence = "`" * (1 + max(map(len, re.findall("`+", file)), default=0))
    return f"All tables: {fence}{command}{fence}"


def _headline(run: RunFile, judgements: Sequence[Judgement], failing: int, gate: str) -> str:
    """Return a line that says whether the run passes and counts its verdicts."""
    wrong = [arm for arm, record in run.arms.items() if record.faulty]
    faults = f" **Wrong outputs, or none:** {as_markdown(named(wrong))}." if wrong else ""
    if not judgements:
        return f"**Nothing was judged.**{faults}"
    counts = Counter(judged.verdict.value for judged in failing_first(judgements))
    fails = f"{failing} of {len(judgements)} verdicts fail" if failing else "No verdict fails"
    setting = "" if gate == "on" else f" (gate: {gate})"
    return f"**{fails}**{setting}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}.{faults}"


def named(names: Sequence[str]) -> str:
    """Return the first names in a list, and the number of further ones."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _first_of(sentences: Sequence[str]) -> str:
    """Return the first sentences, and the number of further ones."""
    more = len(sentences) - _MOST_NAMES
    return " ".join(sentences[:_MOST_NAMES]) + (f" And {more} more." if more > 0 else "")


def _rest(judgements: Sequence[Judgement]) -> str:
    """Return a line with the arms of the verdicts that are in no table."""
    gates: dict[Verdict, dict[str, list[str]]] = {}
    for judged in failing_first(judgements):
        gates.setdefault(judged.verdict, {}).setdefault(judged.arm, []).append(judged.gate)
    passed = gates.pop(Verdict.PASS, {})
    sentences = []
    for verdict, by_arm in gates.items():
        arms = [arm if len(kinds) > 1 else f"{arm} ({kinds[0]})" for arm, kinds in by_arm.items()]
        sentences.append(f"{verdict.value}: {named(arms)}.")
    if whole := sum(len(kinds) > 1 for kinds in passed.values()):
        sentences.append(f"PASS in time and counters: {whole} arm{'s' if whole > 1 else ''}.")
    return " ".join(sentences)


def _speeds(run: RunFile, judgements: Sequence[Judgement]) -> Grid:
    """Build one row for each arm. If the table must be cut, arms with important verdicts come first."""
    changes = {judged.arm: judged.change for judged in judgements if judged.change is not None}
    ranked = dict.fromkeys(judged.arm for judged in failing_first(judgements) if judged.verdict is not Verdict.PASS)
    faulty = [arm for arm, record in run.arms.items() if record.faulty]
    if len(run.arms) > _MOST_ROWS:
        order = [arm for arm in dict.fromkeys([run.header.baseline, *faulty, *ranked, *run.arms]) if arm in run.arms]
    else:
        order = list(run.arms)
    measured = ["throughput", "speedup", "mean_acceptance_length"]
    *heads, length = columns(run, measured)
    heads += [Column("new/old speed", about="the change of speed that is judged, and its interval")] if changes else []
    rows = []
    for arm in order:
        throughput, speedup, tau = cells(run, arm, measured)
        change = [f"{changes[arm]}" if arm in changes else ""] if changes else []
        rows.append([label(run, arm), throughput, speedup, *change, tau, outputs(run, arm)])
    return Grid([Column("arm", figures=False), *heads, length, output_column(run, order)], rows)
