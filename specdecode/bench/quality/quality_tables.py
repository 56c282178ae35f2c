"""The tables of a run of the quality suite, from its file alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from specdecode.bench.quality.tradeoff import COST_COLUMNS, about_speed, against_speed
from specdecode.bench.report.comment import cut_table, whole_report
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.latex import PACKAGES, latex_table
from specdecode.bench.report.markdown import as_markdown, explained_table
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import detectable, figure
from specdecode.evals.intervals import mcnemar, wilson
from specdecode.evals.margins import MarginCheck
from specdecode.evals.results import JUDGED, MEASURES, REFERENCE, NeedleCell, QualityRun


def title(run: QualityRun) -> str:
    """Return the model and the settings of the experiment, as a title."""
    return f"Quality of {run.header.target} in {run.header.dtype}, preset {run.header.preset}"


def costs(run: QualityRun, checks: Sequence[MarginCheck]) -> Grid:
    """Build one row for each arm: perplexity, costs with 95 % intervals, and outcomes; the reference first."""
    measured = [
        COST_COLUMNS["ppl"],
        Column("tokens", about="number that all but PPL are over: with a cache policy, those after the first eviction"),
        *(COST_COLUMNS[measure] for measure in MEASURES),
        Column("KL p99", about="its 99th percentile over tokens"),
        Column("KL max", about="its maximum"),
        Column("top-1", about="share of tokens at which arm and reference choose the same"),
    ]
    about = "whether a cost is within its margin"
    columns = [Column("arm", False), *measured, Column("verdict", False, breaks=True, about=about)]
    rows = [["reference", f"{run.perplexity():.3f}", *[""] * len(measured)]]
    for arm in run.judged_arms:
        estimates = [run.cost(arm, measure) for measure in MEASURES]
        cells = [
            *(f"{cost:.4f}" if cost else "" for cost in estimates),
            *(_known(run.divergence(arm, share), ".4f") for share in (0.99, 1.0)),
            _known(run.agreement(arm), ".1%"),
        ]
        outcomes = [
            f"{MEASURES[check.measure]} {check.outcome.value}"
            for check in checks
            if check.arm == arm and check.measure in MEASURES and check.outcome
        ]
        if "control" in run.arms[arm]:
            outcomes.append(f"(control of {run.arms[arm]['control']}: must fail)")
        rows.append([arm, f"{run.perplexity(arm):.3f}", str(run.tokens(arm)), *cells, " ".join(outcomes)])
    return Grid(columns, rows)


def retrieval(run: QualityRun) -> Grid:
    """Build one row for each arm and length: found needles and the answer's log-probability at each depth."""
    depths = sorted({trial.depth for trial in run.needles})
    about = "found if greedy decoding writes the number; in brackets the mean log-probability of the answer, in nats"
    columns = [Column("needle found by", False, about=about), Column("tokens", about="length of the text")]
    columns += [Column(f"depth {depth:g}") for depth in depths]
    rows = []
    for arm in dict.fromkeys(trial.arm for trial in run.needles):
        cells = run.needle_cells(arm)
        for length in sorted({length for length, _ in cells}):
            rows.append([arm, str(length), *(_retrieved(cells.get((length, depth))) for depth in depths)])
    return Grid(columns, rows)


def _retrieved(cell: NeedleCell | None) -> str:
    return "" if cell is None else f"{cell.found}/{cell.count} ({figure(cell.logprob, '.1f')})"


def scores(run: QualityRun, checks: Sequence[MarginCheck]) -> Grid:
    """Build one row for each task and arm: share of solved problems, flips, their McNemar p, loss and outcome.

    Shares and losses have 95 % intervals. Flips are problems that only the reference or only the arm solves.
    """
    columns = [
        Column("task", False),
        Column("arm", False),
        Column("solved"),
        Column("share", about="of solved problems, with a 95 % interval"),
        Column("lost", about="problems that only the reference solves"),
        Column("won", about="problems that only the arm solves"),
        Column("McNemar p", about="probability that chance alone loses and wins so unequally"),
        Column("loss", about="drop in the share of solved problems, with a 95 % interval"),
        Column("detectable", about="the smallest loss that so many problems can tell from 0"),
        Column("verdict", False, about="whether the loss is within its margin"),
    ]
    rows = []
    for task, arm in dict.fromkeys((answer.task, answer.arm) for answer in run.answers):
        if (score := run.score(arm, task)) is None:
            continue
        row = [JUDGED[task], arm, f"{score.passed}/{score.count}", f"{wilson(score.passed, score.count):.0%}"]
        loss = None if arm == REFERENCE else run.cost(arm, task)
        if loss is None:
            rows.append(row + [""] * (len(columns) - len(row)))
            continue
        outcomes = [c.outcome.value for c in checks if (c.arm, c.measure) == (arm, task) and c.outcome]
        flips = [str(score.lost), str(score.won), f"{mcnemar(score.lost, score.won):.2g}"]
        rows.append([*row, *flips, f"{loss:.0%}", f"{detectable(loss):.0%}", *(outcomes or [""])])
    return Grid(columns, rows)


def notes(run: QualityRun) -> list[str]:
    """Return the notes on the tables."""
    header = run.header
    read = "as a whole" if header.window is None else f"in windows of {header.window} tokens"
    stride = "" if header.stride is None else f", {header.stride} tokens apart"
    sentences = [
        f"{header.target} in {header.dtype}, backend {header.backend}, on {'; '.join(header.origins)}:"
        f" {len(run.documents)} documents ({header.texts}), each read {read}{stride}, starting with an empty cache,"
        f" teacher-forced in steps of {header.k + 1} tokens through the decode path.",
        "The reference is the full cache with unquantised weights.",
    ]
    if header.tasks is not None:
        sentences += [f"{JUDGED[task]} was not asked: {reason}." for task, reason in header.tasks.missing.items()]
        if run.answers:
            sentences.append(
                f"Problems ({'; '.join(header.tasks.origins)}) are answered greedily, in {header.tasks.max_new_tokens}"
                " tokens at most. GSM8K is judged by the last number, HumanEval by a function that passes its tests."
            )
    if header.synthetic:
        sentences.append("The weights are random: this is only a trial, and says nothing about quality.")
    return sentences


def margins(checks: Sequence[MarginCheck]) -> Grid:
    """Build one row for each arm and measure: the outcome and its reason."""
    columns = [
        Column("arm", False),
        Column("of", False),
        Column("verdict", False, about="PASS if the whole interval is within the margin, FAIL if none of it is"),
        Column("why", False, True, "the cost, its margin, and the smallest cost that the run would detect"),
    ]
    return Grid(columns, [[check.arm, JUDGED[check.measure], outcome(check), check.reason] for check in checks])


def outcome(check: MarginCheck) -> str:
    """Return an outcome in words."""
    if check.outcome is None:
        return "not judged"
    return check.outcome.value + (", as expected" if check.outcome is check.expected != "PASS" else "")


def markdown(run: QualityRun, checks: Sequence[MarginCheck], speed: RunFile | None = None) -> str:
    """Return a page with all tables, unexpected outcomes first.

    Args:
        run: run to report.
        checks: checks of its margins.
        speed: a run of `pytest --benchmark` to compare with; None to leave this out.
    """
    parts = [f"## {as_markdown(title(run))}"]
    if wrong := [check for check in checks if check.unexpected]:
        parts.append(
            "\n".join(f"- **{as_markdown(check.arm)}** is {outcome(check)}: {check.reason}" for check in wrong)
        )
    parts += explained_table(costs(run, checks))
    if run.needles:
        parts += explained_table(retrieval(run))
    if run.answers:
        parts += explained_table(scores(run, checks))
    parts.append("\n".join(f"- {as_markdown(note)}" for note in notes(run)))
    if speed is not None:
        parts += ["### Quality against speed", *explained_table(against_speed(run, speed))]
        parts.append("\n".join(f"- {as_markdown(note)}" for note in about_speed(run, speed)))
    parts += ["### Margins", *explained_table(margins(checks))]
    return "\n\n".join(filter(None, parts)) + "\n"


def comment(run: QualityRun, checks: Sequence[MarginCheck], file: str = "") -> str:
    """Return a short comment for a merge request: unexpected outcomes, then costs.

    Args:
        run: run to report.
        checks: checks of its margins.
        file: file of the run, for the command of the whole report; "" if it was not kept.
    """
    wrong, judged = [check for check in checks if check.unexpected], [check for check in checks if check.outcome]
    counts = Counter(outcome(check) for check in checks)
    headline = "No outcome is unexpected" if judged else "Nothing was judged"
    if wrong:
        headline = f"{len(wrong)} of {len(judged)} outcomes are not as expected"
    parts = [f"## {as_markdown(title(run))}"]
    parts.append(f"**{headline}**: {', '.join(f'{count} {name}' for name, count in counts.items())}.")
    if wrong:
        parts.append(cut_table(margins(wrong), "outcomes"))
    parts.append(cut_table(costs(run, checks), "arms"))
    if file:
        parts.append(whole_report(file))
    return "\n\n".join(parts) + "\n"


def latex(run: QualityRun, checks: Sequence[MarginCheck], speed: RunFile | None = None) -> str:
    """Return the tables for a paper, to be included with \\input. The arguments are those of `markdown`."""
    tables = [(costs(run, checks), [f"{title(run)}.", *notes(run)])]
    if run.needles:
        tables.append((retrieval(run), [f"Found needles: {title(run)}."]))
    if run.answers:
        tables.append((scores(run, checks), [f"Tasks: {title(run)}."]))
    if speed is not None:
        tables.append((against_speed(run, speed), about_speed(run, speed)))
    tables.append((margins(checks), [f"Margins: {title(run)}."]))
    captioned = (latex_table(grid, " ".join([*caption, grid.explanations])) for grid, caption in tables)
    return "\n\n".join([PACKAGES, *captioned]) + "\n"


def _known(value: float, spec: str) -> str:
    return "" if math.isnan(value) else figure(value, spec)
