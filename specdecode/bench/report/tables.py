"""The tables of a run, for terminals, Markdown, LaTeX and HTML alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, product

from rich.table import Table
from rich.text import Text

from specdecode.bench.gate.blame import PARTS, blame
from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement
from specdecode.bench.report.captions import (
    cells,
    drafts,
    failing_first,
    label,
    notes,
    one_line,
    outputs,
    percent,
    proposes,
)
from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.load import LOAD, by_concurrency, losses
from specdecode.bench.report.speedup_model import modelled
from specdecode.bench.runs.names import PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile


def verdicts(judgements: Sequence[Judgement], what: str = "arm") -> Grid:
    """Make one row for each verdict on what has a name, the failing ones first."""
    columns = [*(Column(name, figures=False) for name in ("verdict", what, "of")), Column("why", False, True)]
    return Grid(columns, [[j.verdict.value, j.arm, j.gate, j.reason] for j in failing_first(judgements)])


def speeds(run: RunFile) -> Grid:
    """Make one row for each arm: throughput, speedups with intervals, latency, acceptance, check of the output."""
    measured = {
        "throughput": Column("tokens/s"),
        "speedup": Column(f"speedup over {run.header.baseline}"),
        "over_hf": Column(f"over {PEER_BASELINE}"),
        "predicted_speedup": Column("predicted", breaks=True),
        "ttft_s": Column("TTFT ms", breaks=True),
        "tpot_s": Column("TPOT ms", breaks=True),
        "mean_acceptance_length": Column("τ", breaks=True),
        "acceptance_rate": Column("accepted", breaks=True),
        "roofline_share": Column("roofline", breaks=True),
        "self_ppl": Column("self PPL", breaks=True),
        "repetition": Column("repeats", breaks=True),
    }
    if PEER_BASELINE not in run.arms:
        del measured["over_hf"]
    if all(run.measures(arm).self_ppl is None for arm in run.arms):
        del measured["self_ppl"], measured["repetition"]
    columns = [Column("arm", figures=False), *measured.values(), Column("output", figures=False)]
    return Grid(columns, [[label(run, arm), *cells(run, arm, list(measured)), outputs(run, arm)] for arm in run.arms])


def by_part(run: RunFile) -> Grid:
    """Make one row for each arm, task and length of the output; none if there is one task and one length alone."""
    measured = {
        "throughput": Column("tokens/s"),
        "speedup": Column(f"speedup over {run.header.baseline}"),
        "over_hf": Column(f"over {PEER_BASELINE}"),
        "ttft_s": Column("TTFT ms"),
        "tpot_s": Column("TPOT ms"),
        "mean_acceptance_length": Column("τ"),
        "acceptance_rate": Column("accepted"),
        "peak_cache_bytes": Column("KV MB"),
        "grown_bytes": Column("growth MB"),
        "compressions": Column("evictions"),
        "self_ppl": Column("self PPL"),
        "repetition": Column("repeats"),
    }
    if PEER_BASELINE not in run.arms:
        del measured["over_hf"]
    heads = [Column("task", False), Column("prompts"), Column("tokens"), Column("arm", False)]
    columns = [*heads, *measured.values()]
    tasks = run.tasks
    if len(tasks) * len(run.lengths) == 1:
        return Grid(columns, [])
    rows = []
    for (task, prompts), length in product(tasks.items(), run.lengths):
        part = run.with_prompts(prompts).at(length)
        for arm in part.arms:
            if part.arms[arm].rows:
                about = [task, str(len(prompts)), str(length), label(part, arm)]
                rows.append([*about, *cells(part, arm, list(measured))])
    return Grid(columns, rows)


def acceptance(run: RunFile) -> Grid:
    """Make one row for each arm that drafts: of the proposals at each position, the share that was accepted."""
    shares = {arm: record.acceptance_by_position() for arm, record in run.arms.items() if drafts(record)}
    depth = max(map(len, shares.values()), default=0)
    columns = [Column("accepted at position", figures=False), *(Column(str(at + 1)) for at in range(depth))]
    rows = [[label(run, arm), *map(percent, row), *[""] * (depth - len(row))] for arm, row in shares.items()]
    return Grid(columns, rows)


def by_model(run: RunFile) -> Grid:
    """Make one row for each chain that has others like it but for K: its speedup by two models, and as measured."""
    columns = [Column("by the model", figures=False)]
    columns += map(Column, ("K", "alpha", "study's", "exact", "from steps", "measured"))
    rows = []
    for row in chain.from_iterable(modelled(run).values()):
        speedups = [f"{row.study:.2f}", f"{row.exact:.2f}", f"{row.steps:.2f}", f"{row.measured}"]
        rows.append([label(run, row.arm), str(row.k), percent(row.acceptance), *speedups])
    return Grid(columns, rows)


def limits(run: RunFile) -> Grid:
    """Make one row for each arm that drafts: its speedup over its baseline, split into factors by `blame`.

    A step's time has a column of its own, for the arms whose parts of a step nobody timed.
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
        rows.append([label(run, arm), *factors, f"{math.exp(-sum(shares.values())):.2f}"])
    return Grid([Column("what limits it", figures=False), *map(Column, (*causes, "all"))], rows)


def memory(run: RunFile) -> Grid:
    """Make one row for each arm of ours: the memory of its weights, of its cache and of all that comes and goes."""
    measured = {
        "weight_bytes": "weights MB",
        "peak_cache_bytes": "KV MB",
        "grown_bytes": "growth MB",
        "compressions": "evictions",
        "peak_bytes": "peak MB",
    }
    rows = [[label(run, arm), *row] for arm in run.arms if any(row := cells(run, arm, list(measured)))]
    return Grid([Column("arm", figures=False), *map(Column, measured.values())], rows)


def past_speedups(run: RunFile, past: History) -> Grid:
    """Make one row for each run that was the baseline, and this one last: every arm's speedup."""
    columns = [Column(name, figures=False) for name in ("date", "commit", "reason")]
    rows = [
        [then.date, then.commit, then.reason if then is not run else "this run"]
        + [f"{then.speedup(arm)}" if arm in then.arms and then.arms[arm].rows else "" for arm in run.arms]
        for then in past.until(run)
    ]
    return Grid([*columns, *(Column(label(run, arm)) for arm in run.arms)], rows)


def surroundings(run: RunFile) -> list[Grid]:
    """Show what times depend on besides the code: hardware and versions, and what may change while a run lasts."""
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
    """Make the table of speeds for a terminal."""
    table = rich_table(speeds(run))
    table.caption, table.caption_justify = Text("\n".join(notes(run))), "left"
    return table


def load_table(run: RunFile) -> Table | None:
    """Make the table by concurrency for a terminal; None where no arms differ in it alone."""
    grid = by_concurrency(run)
    if not grid.rows:
        return None
    table = rich_table(grid)
    table.caption, table.caption_justify = Text("\n".join([LOAD, *losses(run)])), "left"
    return table


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """Make the table of verdicts for a terminal."""
    return rich_table(verdicts(judgements))
