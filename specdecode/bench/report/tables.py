"""The tables of a run, for terminals, Markdown, LaTeX and HTML alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, product

from rich.table import Table

from specdecode.bench.gate.blame import PARTS, blame
from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement
from specdecode.bench.report.captions import (
    BLESSED,
    cells,
    columns,
    drafts,
    failing_first,
    label,
    marked,
    notes,
    one_line,
    output_column,
    outputs,
    percent,
    proposes,
    verdict_columns,
)
from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.load import by_concurrency, losses
from specdecode.bench.report.speedup_model import modelled
from specdecode.bench.runs.names import PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile


def verdicts(judgements: Sequence[Judgement], what: str = "arm") -> Grid:
    """Return a table with one row for each verdict, failing ones first. `what` heads the column of names."""
    rows = [[judged.verdict.value, judged.arm, judged.gate, judged.reason] for judged in failing_first(judgements)]
    return Grid(verdict_columns(what), rows)


def speeds(run: RunFile) -> Grid:
    """Build one row for each arm: throughput, speedups with intervals, latency, acceptance, check of the output."""
    measured = ["throughput", "speedup", "over_hf", "predicted_speedup", "ttft_s", "tpot_s", "mean_acceptance_length"]
    measured += ["acceptance_rate", "roofline_share", "self_ppl", "repetition"]
    known = _known(run, measured)
    heads = [Column("arm", figures=False), *columns(run, known), output_column(run, run.arms)]
    return Grid(heads, [[label(run, arm), *cells(run, arm, known), outputs(run, arm)] for arm in run.arms])


def _known(run: RunFile, measures: Sequence[str]) -> list[str]:
    """Return the measures without those that the run lacks: transformers' arm, or the scores of outputs."""
    missing = set() if PEER_BASELINE in run.arms else {"over_hf"}
    if all(run.measures(arm).self_ppl is None for arm in run.arms):
        missing |= {"self_ppl", "repetition"}
    return [measure for measure in measures if measure not in missing]


def by_part(run: RunFile) -> Grid:
    """Build one row for each arm, task and output length; none if there is only one task and one length."""
    measured = ["throughput", "speedup", "over_hf", "ttft_s", "tpot_s", "mean_acceptance_length", "acceptance_rate"]
    measured += ["peak_cache_bytes", "grown_bytes", "compressions", "self_ppl", "repetition"]
    known = _known(run, measured)
    heads = [Column("task", False), Column("prompts"), Column("tokens"), Column("arm", False), *columns(run, known)]
    tasks = run.tasks
    if len(tasks) * len(run.lengths) == 1:
        return Grid(heads, [])
    rows = []
    for (task, prompts), length in product(tasks.items(), run.lengths):
        part = run.with_prompts(prompts).at(length)
        for arm in part.arms:
            if part.arms[arm].rows:
                about = [task, str(len(prompts)), str(length), marked(part, arm)]
                rows.append([*about, *cells(part, arm, known)])
    return Grid(heads, rows)


def acceptance(run: RunFile) -> Grid:
    """Build one row for each drafting arm: the share of proposals accepted at each position."""
    shares = {arm: record.acceptance_by_position() for arm, record in run.arms.items() if drafts(record)}
    depth = max(map(len, shares.values()), default=0)
    about = "share of the drafts that reach a position whose proposal there was accepted"
    heads = [Column("accepted at position", figures=False, about=about)]
    heads += [Column(str(at + 1)) for at in range(depth)]
    rows = [[label(run, arm), *map(percent, row), *[""] * (depth - len(row))] for arm, row in shares.items()]
    return Grid(heads, rows)


def by_model(run: RunFile) -> Grid:
    """Build one row for each chain arm that differs from another only in K: speedups by two models and measured."""
    heads = [
        Column("by the model", figures=False),
        Column("K", about="proposals per step, at most"),
        Column("alpha", about="probability that a proposal is accepted if all earlier ones were"),
        Column("study's", about="the study's approximation, (1 + K alpha) / (1 + K T_draft / T_target)"),
        Column("exact", about="the expectation of a chain (Leviathan et al. 2023), with the measured depths and costs"),
        Column("from steps", about="from the measured tokens and times of the steps, without overhead"),
        Column("measured", about=f"the speedup over {run.compared_with}, overhead included"),
    ]
    rows = []
    for row in chain.from_iterable(modelled(run).values()):
        speedups = [f"{row.study:.2f}", f"{row.exact:.2f}", f"{row.steps:.2f}", f"{row.measured}"]
        rows.append([label(run, row.arm), str(row.k), percent(row.acceptance), *speedups])
    return Grid(heads, rows)


def limits(run: RunFile) -> Grid:
    """Build one row for each drafting arm: its speedup over its reference arm, split into factors by `blame`.

    For arms without times of a step's parts, the time of the whole step is one factor, in a column of its own.
    """
    splits = {}
    for arm, record in run.arms.items():
        baseline = run.arms.get(run.baseline_of(arm), ArmRecord({}))
        prompts = [prompt for prompt in record.rows if prompt in baseline.rows]
        if proposes(record) and (split := blame(record, baseline, prompts)):
            splits[arm] = split.shares
    known = dict.fromkeys(chain.from_iterable(splits.values()))
    causes = sorted(known, key=["acceptance length", *PARTS, *known].index)
    rows = []
    for arm, shares in splits.items():
        factors = [f"{math.exp(-shares[cause]):.2f}" if cause in shares else "" for cause in causes]
        rows.append([marked(run, arm), *factors, f"{math.exp(-sum(shares.values())):.2f}"])
    about = "factors of the speedup over the reference arm, of all tokens together; 0.80 costs a fifth of the speed"
    heads = [Column("what limits it", figures=False, about=about)]
    heads += [Column(cause, about=_CAUSES.get(cause, "")) for cause in causes]
    return Grid([*heads, Column("all", about="the product of the factors")], rows)


_CAUSES = {
    "acceptance length": "steps that accepted proposals save",
    "time a step": "where the parts of a step were not timed",
} | dict.fromkeys(PARTS, "its time in a step")
"""The explanations of the columns of `limits`."""


def memory(run: RunFile) -> Grid:
    """Build one row for each arm of this package: memory of its weights and its cache, and its peak memory."""
    measured = ["weight_bytes", "peak_cache_bytes", "grown_bytes", "compressions", "peak_bytes"]
    rows = [[label(run, arm), *row] for arm in run.arms if any(row := cells(run, arm, measured))]
    return Grid([Column("arm", figures=False), *columns(run, measured)], rows)


def details(run: RunFile) -> dict[str, Grid]:
    """Return the tables of a run beside its speeds that have rows, by their headings."""
    grids = {
        "By task and length": by_part(run),
        "Acceptance": acceptance(run),
        "What limits the speedup": limits(run),
        "By the model": by_model(run),
        "Memory": memory(run),
    }
    return {heading: grid for heading, grid in grids.items() if grid.rows}


def past_speedups(run: RunFile, past: History) -> Grid:
    """Build one row for each former baseline, and a last one for this run: the speedup of every arm."""
    about = f"of a baseline; its row has the speedups over {run.compared_with} in that run, with their intervals"
    heads = [Column("date", False, about=about), Column("commit", False), Column("reason", False, about=BLESSED)]
    rows = [
        [then.date, then.commit, then.reason if then is not run else "this run"]
        + [_past_speedup(then, arm) if arm in then.arms else "" for arm in run.arms]
        for then in past.until(run)
    ]
    return Grid([*heads, *(Column(label(run, arm)) for arm in run.arms)], rows)


def _past_speedup(run: RunFile, arm: str) -> str:
    """Return the speedup, WRONG or FAILED if the arm's times are void, or "" if it has none."""
    if run.arms[arm].faulty:
        return outputs(run, arm)
    return f"{run.speedup(arm)}" if run.arms[arm].rows else ""


def surroundings(run: RunFile) -> list[Grid]:
    """Return tables of influences on times besides the code: hardware, versions, and conditions that may change."""
    versions = [["hardware", run.header.identity.hardware]]
    versions += [[name, str(value)] for name, value in run.header.versions.items()]
    reached: dict[str, str] = {}
    for arm, record in run.arms.items():
        table = record.options.get("server", {})
        for how in ("command", "url"):
            if how in table:
                reached.setdefault(one_line(table[how]), f"{how} of {arm}")
    versions += [[what, how] for how, what in reached.items()]
    grids = [Grid([Column("measured with", False), Column("", False, True)], versions)]
    if conditions := run.header.conditions:
        names = dict.fromkeys(name for condition in conditions.values() for name in condition)
        rows = [[name, *(str(condition.get(name, "")) for condition in conditions.values())] for name in names]
        grids.append(Grid([Column("condition", False), *(Column(when) for when in conditions)], rows))
    return grids


def speed_table(run: RunFile) -> Table:
    """Return the table of speeds for a terminal."""
    return rich_table(speeds(run), notes(run))


def load_table(run: RunFile) -> Table | None:
    """Return the table by concurrency for a terminal; None if no arms differ only in concurrency."""
    grid = by_concurrency(run)
    return rich_table(grid, losses(run)) if grid.rows else None
