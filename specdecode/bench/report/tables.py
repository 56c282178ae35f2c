"""A run in tables: what was found, in what order, and how it is written in a terminal, in Markdown and in LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, product

from rich.table import Table
from rich.text import Text

from specdecode.bench.gate.blame import PARTS, blame
from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement
from specdecode.bench.report.captions import cells, drafts, failing_first, label, notes, outputs, percent
from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.speedup_model import modelled
from specdecode.bench.runs.names import BASELINE, PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile


def verdicts(judgements: Sequence[Judgement]) -> Grid:
    """One row a verdict, the failing ones first."""
    columns = [*(Column(name, figures=False) for name in ("verdict", "arm", "of")), Column("why", False, True)]
    return Grid(columns, [[j.verdict.value, j.arm, j.gate, j.reason] for j in failing_first(judgements)])


def speeds(run: RunFile) -> Grid:
    """One row an arm: throughput, speedups with their 95 % intervals, latency, acceptance, output check."""
    measured = {
        "throughput": Column("tokens/s"),
        "speedup": Column("speedup over ar"),
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
    """One row an arm for each task and each length of the output; none where there is one of both alone."""
    measured = {
        "throughput": Column("tokens/s"),
        "speedup": Column("speedup over ar"),
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
        part = run.of(prompts).at(length)
        for arm in part.arms:
            if part.arms[arm].rows:
                about = [task, str(len(prompts)), str(length), label(part, arm)]
                rows.append([*about, *cells(part, arm, list(measured))])
    return Grid(columns, rows)


def acceptance(run: RunFile) -> Grid:
    """One row an arm that drafts: of the proposals at each position, the share that was accepted."""
    shares = {arm: record.acceptance_by_position() for arm, record in run.arms.items() if drafts(record)}
    depth = max(map(len, shares.values()), default=0)
    columns = [Column("accepted at position", figures=False), *(Column(str(at + 1)) for at in range(depth))]
    rows = [[label(run, arm), *map(percent, of), *[""] * (depth - len(of))] for arm, of in shares.items()]
    return Grid(columns, rows)


def by_model(run: RunFile) -> Grid:
    """One row a chain that has others like it but for K: the speedup over `ar` by two models, and as measured."""
    columns = [Column("by the model", figures=False)]
    columns += map(Column, ("K", "alpha", "study's", "exact", "from steps", "measured"))
    rows = []
    for of in chain.from_iterable(modelled(run).values()):
        found = [percent(of.acceptance), f"{of.study:.2f}", f"{of.exact:.2f}", f"{of.steps:.2f}", f"{of.measured}"]
        rows.append([label(run, of.arm), str(of.k), *found])
    return Grid(columns, rows)


def limits(run: RunFile) -> Grid:
    """One row an arm that drafts: its speedup over `ar`, split into factors by `blame`."""
    causes = ("acceptance length", *PARTS)
    columns = [Column("what limits it", figures=False), *map(Column, (*causes, "all"))]
    plainly, rows = run.arms.get(BASELINE, ArmRecord({})), []
    for arm, record in run.arms.items():
        if drafts(record) and (found := blame(record, plainly, [each for each in record.rows if each in plainly.rows])):
            shares = [*(found.shares[cause] for cause in causes), sum(found.shares.values())]
            rows.append([label(run, arm), *(f"{math.exp(-share):.2f}" for share in shares)])
    return Grid(columns, rows)


def memory(run: RunFile) -> Grid:
    """One row an arm of ours: what its weights, its cache and all that comes and goes took of the memory."""
    measured = {
        "weight_bytes": "weights MB",
        "peak_cache_bytes": "KV MB",
        "grown_bytes": "growth MB",
        "compressions": "evictions",
        "peak_bytes": "peak MB",
    }
    rows = [[label(run, arm), *of] for arm in run.arms if any(of := cells(run, arm, list(measured)))]
    return Grid([Column("arm", figures=False), *map(Column, measured.values())], rows)


def past_speedups(run: RunFile, past: History) -> Grid:
    """One row a run that was the baseline, and this one last: every arm's speedup over `ar`."""
    columns = [Column(name, figures=False) for name in ("date", "commit", "reason")]
    rows = [
        [then.date, then.commit, then.reason if then is not run else "this run"]
        + [f"{then.speedup(arm)}" if arm in then.arms and then.arms[arm].rows else "" for arm in run.arms]
        for then in timeline(run, past)
    ]
    return Grid([*columns, *(Column(label(run, arm)) for arm in run.arms)], rows)


def timeline(run: RunFile, past: History) -> list[RunFile]:
    """The runs that were the baseline, then this one, unless it is the last of them."""
    known = bool(past.runs) and past.runs[-1].arms == run.arms
    return [*(past.runs[:-1] if known else past.runs), run]


def surroundings(run: RunFile) -> list[Grid]:
    """What times depend on besides the code: hardware and versions; what may change while a run lasts."""
    what = [["hardware", run.header.identity.hardware]]
    what += [[name, str(value)] for name, value in run.header.versions.items()]
    found = [Grid([Column("measured with", False), Column("", False, True)], what)]
    if around := run.header.conditions:
        names = dict.fromkeys(name for told in around.values() for name in told)
        rows = [[name, *(str(told.get(name, "")) for told in around.values())] for name in names]
        found.append(Grid([Column("condition", False), *(Column(when) for when in around)], rows))
    return found


def speed_table(run: RunFile) -> Table:
    """The speeds for a terminal."""
    table = rich_table(speeds(run))
    table.caption, table.caption_justify = Text("\n".join(notes(run))), "left"
    return table


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """The verdicts for a terminal."""
    return rich_table(verdicts(judgements))
