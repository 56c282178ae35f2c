"""A run of the quality suite in tables, from its file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from specdecode.bench.quality.tradeoff import about_speed, against_speed
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.latex import PACKAGES, latex_table
from specdecode.bench.report.markdown import as_markdown, markdown_table
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import detectable
from specdecode.evals.intervals import mcnemar, wilson
from specdecode.evals.results import JUDGED, MEASURES, REFERENCE, Judgement, QualityRun


def title(run: QualityRun) -> str:
    """The model, and what the experiment is."""
    return f"Quality of {run.header['target']} in {run.header['dtype']}, preset {run.header['preset']}"


def costs(run: QualityRun, judgements: Sequence[Judgement]) -> Grid:
    """One row an arm: perplexity, what it costs with 95 % intervals, and the verdicts; the reference first."""
    figures = ["PPL", "tokens", *MEASURES.values(), "KL p99", "KL max", "top-1"]
    columns = [Column("arm", False), *map(Column, figures), Column("verdict", False, breaks=True)]
    rows = [["reference", f"{run.perplexity():.3f}", *[""] * len(figures)]]
    for arm in run.judged_arms:
        of = [run.cost(arm, measure) for measure in MEASURES]
        shown = [
            *(f"{cost:.4f}" if cost else "" for cost in of),
            *(_figure(run.divergence(arm, share), ".4f") for share in (0.99, 1.0)),
            _figure(run.agreement(arm), ".1%"),
        ]
        said = [each for each in judgements if each.arm == arm and each.measure in MEASURES]
        verdicts = [f"{MEASURES[each.measure]} {each.verdict.value}" for each in said if each.verdict]
        if "control" in run.arms[arm]:
            verdicts.append(f"(control of {run.arms[arm]['control']}: has to fail)")
        rows.append([arm, f"{run.perplexity(arm):.3f}", str(run.tokens(arm)), *shown, " ".join(verdicts)])
    return Grid(columns, rows)


def retrieval(run: QualityRun) -> Grid:
    """One row an arm and a length: at each depth the share of needles that are found, and the answer's log p."""
    depths = sorted({each.depth for each in run.needles})
    columns = [Column("needle found by", False), Column("tokens"), *(Column(f"depth {depth:g}") for depth in depths)]
    rows = []
    for arm in dict.fromkeys(each.arm for each in run.needles):
        grid = run.grid(arm)
        for length in sorted({length for length, _ in grid}):
            cells = [grid.get((length, depth), []) for depth in depths]
            shown = [
                f"{sum(each.exact for each in cell)}/{len(cell)} ({sum(e.logprob for e in cell) / len(cell):.1f})"
                if cell
                else ""
                for cell in cells
            ]
            rows.append([arm, str(length), *shown])
    return Grid(columns, rows)


def scores(run: QualityRun, judgements: Sequence[Judgement]) -> Grid:
    """One row a task and an arm: the share of problems that it solves with its 95 % interval, which of them otherwise
    than the reference, how likely flips so uneven are by chance, how much that costs, and the verdict."""
    heads = ("solved", "share", "lost", "won", "McNemar p", "loss", "detectable")
    columns = [Column("task", False), Column("arm", False), *map(Column, heads), Column("verdict", False)]
    rows = []
    for task, arm in dict.fromkeys((each.task, each.arm) for each in run.answers):
        if (score := run.score(arm, task)) is None:
            continue
        row = [JUDGED[task], arm, f"{score.passed}/{score.count}", f"{wilson(score.passed, score.count):.0%}"]
        loss = None if arm == REFERENCE else run.cost(arm, task)
        if loss is None:
            rows.append(row + [""] * (len(columns) - len(row)))
            continue
        verdicts = [j.verdict.value for j in judgements if (j.arm, j.measure) == (arm, task) and j.verdict]
        flips = [str(score.lost), str(score.won), f"{mcnemar(score.lost, score.won):.2g}"]
        rows.append([*row, *flips, f"{loss:.0%}", f"{detectable(loss):.0%}", *(verdicts or [""])])
    return Grid(columns, rows)


def notes(run: QualityRun) -> list[str]:
    """What the tables do not say by themselves."""
    header = run.header
    read = "as a whole" if header["window"] is None else f"in windows of {header['window']} tokens"
    stride = "" if header["stride"] is None else f", {header['stride']} tokens apart"
    said = [
        f"{header['target']} in {header['dtype']}, backend {header['backend']}, on {'; '.join(header['origins'])}:"
        f" {len(run.documents)} documents ({header['texts']}), each read {read}{stride} and with an empty cache,"
        f" teacher-forced in steps of {header['k'] + 1} tokens through the decode path.",
        "The reference is the full cache with the weights as they are. ΔNLL and KL(reference || arm) are in nats a"
        " token, with 95 % intervals over documents. Of a cache policy they, p99, max and top-1 agreement are of the"
        " tokens behind the first eviction, whose number stands beside.",
    ]
    if run.needles:
        said.append("A needle is found if greedy decoding writes the number; in brackets the log-probability of it.")
    tasks: Any = header.get("tasks")
    if tasks is not None:
        said += [f"{JUDGED[task]} was not asked: {reason}." for task, reason in tasks["missing"].items()]
    if run.answers:
        said.append(
            f"Problems ({'; '.join(tasks['origins'])}) are answered greedily, in {tasks['max_new_tokens']} tokens at"
            " most: GSM8K by the last number, HumanEval by a function that passes its tests. Lost and won are problems"
            " that only the reference solves, or only the arm; the loss is the share by which fewer are solved, and"
            " detectable the least one that so many problems could have told from none."
        )
    if header["synthetic"]:
        said.append("The weights are random: this is a rehearsal, and says nothing of quality.")
    return said


def margins(judgements: Sequence[Judgement]) -> Grid:
    """One row an arm and measure: the verdict, and how it came about."""
    columns = [*(Column(name, False) for name in ("arm", "of", "verdict")), Column("why", False, breaks=True)]
    return Grid(columns, [[each.arm, JUDGED[each.measure], verdict(each), each.reason] for each in judgements])


def unexpected(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Those that are not as they have to be: a lossy part beyond its margin, or a control within it."""
    return [each for each in judgements if each.verdict not in (None, each.expected)]


def verdict(judgement: Judgement) -> str:
    """In words."""
    if judgement.verdict is None:
        return "not judged"
    return judgement.verdict.value + (", as it has to" if judgement.verdict is judgement.expected != "PASS" else "")


def markdown(run: QualityRun, judgements: Sequence[Judgement], speed: RunFile | None = None) -> str:
    """The tables as a page, verdicts that are not as expected first.

    Args:
        run: that it is about.
        judgements: on it.
        speed: a run of `pytest --benchmark` that is told beside.
    """
    parts = [f"## {as_markdown(title(run))}"]
    if wrong := unexpected(judgements):
        parts.append("\n".join(f"- **{as_markdown(each.arm)}** is {verdict(each)}: {each.reason}" for each in wrong))
    parts.append(markdown_table(costs(run, judgements)))
    if run.needles:
        parts.append(markdown_table(retrieval(run)))
    if run.answers:
        parts.append(markdown_table(scores(run, judgements)))
    parts.append("\n".join(f"- {as_markdown(note)}" for note in notes(run)))
    if speed is not None:
        parts += ["### Quality against speed", markdown_table(against_speed(run, speed))]
        parts.append("\n".join(f"- {as_markdown(note)}" for note in about_speed(run, speed)))
    parts += ["### Margins", markdown_table(margins(judgements))]
    return "\n\n".join(parts) + "\n"


def latex(run: QualityRun, judgements: Sequence[Judgement], speed: RunFile | None = None) -> str:
    """The same tables for a paper, to be put in with \\input; arguments as for `markdown`."""
    parts = [PACKAGES, latex_table(costs(run, judgements), " ".join([f"{title(run)}.", *notes(run)]))]
    if run.needles:
        parts.append(latex_table(retrieval(run), f"Needles that were found: {title(run)}."))
    if run.answers:
        parts.append(latex_table(scores(run, judgements), f"Tasks: {title(run)}."))
    if speed is not None:
        parts.append(latex_table(against_speed(run, speed), " ".join(about_speed(run, speed))))
    parts.append(latex_table(margins(judgements), f"Margins: {title(run)}."))
    return "\n\n".join(parts) + "\n"


def _figure(value: float, spec: str) -> str:
    return "" if math.isnan(value) else format(value, spec)
