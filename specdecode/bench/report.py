"""A run in tables: what was found, in what order, and how it is written in a terminal, in Markdown and in LaTeX."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from specdecode.bench.gate.blame import PARTS, blame
from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.model import modelled
from specdecode.bench.runs.names import BASELINE, FLAGS, PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile
from specdecode.support.files import slug

FORMATS: dict[str, Callable[[float], str]] = {
    "throughput": "{:.1f}".format,
    "throughput_std": "{:.1f}".format,
    "predicted_speedup": "{:.2f}".format,
    "ttft_s": lambda seconds: f"{1e3 * seconds:.0f}",
    "tpot_s": lambda seconds: f"{1e3 * seconds:.1f}",
    "mean_acceptance_length": "{:.2f}".format,
    "acceptance_rate": "{:.0%}".format,
    "roofline_share": "{:.0%}".format,
    "weight_bytes": lambda held: f"{held / 1e6:.1f}",
    "peak_cache_bytes": lambda held: f"{held / 1e6:.1f}",
    "peak_bytes": lambda held: f"{held / 1e6:.1f}",
    "grown_bytes": lambda held: f"{held / 1e6:.1f}",
    "compressions": "{:.1f}".format,
    "agreement": "{:.0%}".format,
    "self_ppl": "{:.2f}".format,
    "repetition": "{:.0%}".format,
}
"""How tables write the measures."""

LOOPS = 0.5
"""The share of 4-grams that stood in the output before from which on it is told to loop."""

MEMORY = (
    "Weights are the target's, as they are stored; KV is the most that was held of keys and values, and its growth by"
    " how much that is more than after the first step; evictions are a run's; the peak is the most that was held at"
    " once in a short run, above all loaded weights."
)
"""What a table of memory does not say by itself."""


MODEL = (
    "Alpha is the probability that a proposal is accepted once those before it were. The study's approximation is"
    " (1 + K alpha) / (1 + K T_draft / T_target); the exact expectation is a chain's (Leviathan et al. 2023), with the"
    " depths and the costs that were measured; from steps is what the steps really gave, without overhead."
)
"""What a table of models does not say by itself."""

LIMITS = (
    "The speedup over ar of all tokens together as a product: how many fewer steps the acceptance length asks for, and"
    " what drafting, verifying a draft and overhead leave of that. A factor of 0.80 costs a fifth of the speed."
)
"""What a table of limits does not say by itself."""


class Column(NamedTuple):
    """A column of a table: figures stand to the right, sentences may be broken over lines."""

    name: str
    figures: bool = True
    breaks: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table that has no format yet. Its cells may hold anything: whoever writes them escapes them."""

    columns: list[Column]
    rows: list[list[str]]


# What an entry of a preset says of the target that is decoded, and not of how drafts are made.
_LOSS = ("policy", "cache", "quantize", "backend")


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
    if not any("self_ppl" in run.measures(arm) for arm in run.arms):
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
    rows = [[label(run, arm), *map(_percent, of), *[""] * (depth - len(of))] for arm, of in shares.items()]
    return Grid(columns, rows)


def by_model(run: RunFile) -> Grid:
    """One row a chain that has others like it but for K: the speedup over `ar` by two models, and as measured."""
    columns = [Column("by the model", figures=False)]
    columns += map(Column, ("K", "alpha", "study's", "exact", "from steps", "measured"))
    rows = []
    for of in chain.from_iterable(modelled(run).values()):
        found = [_percent(of.acceptance), f"{of.study:.2f}", f"{of.exact:.2f}", f"{of.steps:.2f}", f"{of.measured}"]
        rows.append([label(run, of.arm), str(of.k), *found])
    return Grid(columns, rows)


def limits(run: RunFile) -> Grid:
    """One row an arm that drafts: its speedup over `ar`, split into factors by `blame`."""
    causes = ("acceptance length", *PARTS.values())
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


def title(run: RunFile) -> str:
    """The models, and what the experiment is."""
    of = run.header.identity
    size = f"{len(run.header.outputs)} prompts x {run.header.max_new_tokens} tokens"
    return f"{models(run)}, {of.dtype} on {of.hardware}, preset {of.preset}, {size}"


def models(run: RunFile) -> str:
    """The target, and the draft if there is one."""
    of = run.header.identity
    return f"{of.target} with {of.draft}" if of.draft else of.target


def judged_by(run: RunFile, old: RunFile | None, expected: Path) -> str:
    """What the verdicts compare with, in words.

    Args:
        run: that is judged.
        old: its baseline.
        expected: where there would be one.
    """
    if old is None:
        return f"No baseline for this hardware: {expected} is not there, so nothing was judged."
    told = f"Judged by {old.path}"
    told += f", of {old.date}: {old.reason}." if old.reason else "."
    ours, theirs = run.header, old.header
    if theirs.identity.hardware != ours.identity.hardware:
        told += " It is another machine's: counters are judged, times are not."
    different = [
        f"{name} {theirs.versions[name]} -> {value}"
        for name, value in ours.versions.items()
        if theirs.versions.get(name, value) != value
    ]
    return told + (f" What is not as it was: {', '.join(different)}." if different else "")


def command(run: RunFile) -> str:
    """The command that measures the same again, as far as the file tells."""
    of, header = run.header.identity, run.header
    sets = Counter(prompt.rpartition("/")[0] for prompt in header.outputs)
    repeats = max((row.counts["runs"] for record in run.arms.values() for row in record.rows.values()), default=1)
    flags = [flag for flag in FLAGS if flag in of.preset.split(".")[1:]]
    options = {
        "preset": of.preset.removesuffix("".join(f".{flag}" for flag in flags)),
        "target": of.target,
        "draft": of.draft,
        "device": "cuda" if slug(str(header.versions.get("gpu", ""))) == of.hardware else "cpu",
        "dtype": of.dtype,
        "prompts": ",".join(f"{name}:{count}" for name, count in sets.items()),
        "max-new-tokens": str(header.max_new_tokens),
        "repeats": f"{repeats:.0f}",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value]
    return shlex.join(["pytest", "--benchmark", *given, *(f"--{flag}" for flag in flags)])


def speed_table(run: RunFile) -> Table:
    """The speeds for a terminal."""
    table = rich_table(speeds(run))
    table.caption, table.caption_justify = Text("\n".join(notes(run))), "left"
    return table


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """The verdicts for a terminal."""
    return rich_table(verdicts(judgements))


def rich_table(grid: Grid) -> Table:
    """A table for a terminal."""
    table = Table()
    for column in grid.columns:
        table.add_column(column.name, justify="right" if column.figures else "left", no_wrap=not column.breaks)
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


def cells(run: RunFile, arm: str, columns: Sequence[str]) -> list[str]:
    """Measures of an arm as text; empty where it has none."""
    measures = run.measures(arm)
    texts = {name: FORMATS[name](value) for name, value in measures.items() if name in FORMATS}
    if "throughput_std" in texts:
        texts["throughput"] += f" ± {texts['throughput_std']}"
    if "speedup" in measures:
        texts["speedup"] = f"{run.speedup(arm)}"
    if run.log_speedups(arm, over=PEER_BASELINE):
        texts["over_hf"] = f"{run.speedup(arm, over=PEER_BASELINE)}"
    return [texts.get(column, "") for column in columns]


def notes(run: RunFile) -> list[str]:
    """What a table of speeds does not say by itself."""
    said = [
        "Baseline ar: autoregressive decoding by this package. Intervals are 95 %.",
        f"A/A floor: two runs of ar differ by up to {math.expm1(run.header.floor):.1%} in the mean.",
        "Predicted: from acceptance and forwards, without overhead. Roofline: share of the speed at which memory can"
        f" stream the weights, {run.header.roofline:.0f} tokens/s.",
    ]
    peers = {arm: record.against for arm, record in run.arms.items() if record.against}
    if compared := {arm: peer for arm, peer in peers.items() if run.log_speedups(arm, over=peer)}:
        told = "; ".join(f"{arm} over {peer} {run.speedup(arm, over=peer)}" for arm, peer in compared.items())
        said.append(f"Against transformers, same draft and settings: {told}.")
    if any(record.lossy for record in run.arms.values()):
        said.append(
            "Lossy: checked against plain decoding with the same cache and the same weights. The share is that of its"
            " tokens that come before it leaves ar's output."
        )
    own = {arm: base for arm in run.arms if (base := plain(run, arm)) is not None}
    if own := {arm: base for arm, base in own.items() if run.log_speedups(arm, over=base)}:
        told = "; ".join(f"{arm} over {base} {run.speedup(arm, over=base)}" for arm, base in own.items())
        said.append(f"Against plain decoding with the same loss: {told}.")
    if any("repetition" in run.measures(arm) for arm in run.arms):
        said.append(
            "Self PPL: how likely the target finds the output, with its full cache. It says nothing of quality: it"
            f" falls when a text loops. Repeats: 4-grams that stood in the output before; from {LOOPS:.0%} on it loops,"
            " and what is fast there is fast at repeating."
        )
    return said + [f"Beware: {warning}." for warning in run.header.warnings]


def markdown(
    run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], past: History | None = None
) -> str:
    """A page for a merge request: verdicts first, then speeds.

    Args:
        run: that it is about.
        title: its first line.
        judged_by: what the verdicts compare with.
        judgements: the verdicts.
        past: of the baseline; with it come all the rest that the file tells.
    """
    parts = [f"## {as_markdown(title)}", as_markdown(judged_by)]
    if judgements:
        parts.append(markdown_table(verdicts(judgements)))
    parts += [markdown_table(speeds(run)), "\n".join(f"- {as_markdown(note)}" for note in notes(run))]
    if past is not None:
        if (split := by_part(run)).rows:
            parts += ["### By task and length", markdown_table(split)]
        if (accepted := acceptance(run)).rows:
            parts += ["### Acceptance", markdown_table(accepted)]
        if (limited := limits(run)).rows:
            parts += ["### What limits the speedup", markdown_table(limited), as_markdown(LIMITS)]
        if (promised := by_model(run)).rows:
            parts += ["### By the model", markdown_table(promised), as_markdown(MODEL)]
        if (held := memory(run)).rows:
            parts += ["### Memory", markdown_table(held), as_markdown(MEMORY)]
        parts += ["### History", as_markdown(past.told)]
        if past.runs:
            parts.append(markdown_table(past_speedups(run, past)))
        parts += ["### Measured with", *map(markdown_table, surroundings(run)), f"    {_one_line(command(run))}"]
    return "\n\n".join(parts) + "\n"


def markdown_table(grid: Grid) -> str:
    """A table in Markdown."""
    heads = [as_markdown(column.name) for column in grid.columns]
    rules = ["--:" if column.figures else "---" for column in grid.columns]
    rows = [heads, rules, *([as_markdown(cell) for cell in row] for row in grid.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_IN_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;"} | {sign: f"\\{sign}" for sign in "\\|`*"})


def as_markdown(text: str) -> str:
    """The text as it is: neither mark-up, nor a link, nor the end of a cell."""
    return _one_line(text).translate(_IN_MARKDOWN).replace("](", "]\\(")


def latex(
    run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], past: History | None = None
) -> str:
    """The same tables for a paper, to be put in with \\input; arguments as for `markdown`.

    The history is left out: a column for each arm is more than fits on a page.
    """
    parts = [PACKAGES]
    if judgements:
        parts.append(latex_table(verdicts(judgements), f"Verdicts: {title}. {judged_by}"))
    parts.append(
        latex_table(speeds(run), " ".join([f"Speed: {title}.", *([] if judgements else [judged_by]), *notes(run)]))
    )
    if (split := by_part(run)).rows:
        parts.append(latex_table(split, f"By task and length of the output: {title}."))
    if (accepted := acceptance(run)).rows:
        parts.append(latex_table(accepted, f"Share of the proposals at a position that were accepted: {title}."))
    if (promised := by_model(run)).rows:
        parts.append(latex_table(promised, f"Speedup over ar by the model: {title}. {MODEL}"))
    if (held := memory(run)).rows:
        parts.append(latex_table(held, f"Memory: {title}. {MEMORY}"))
    captions = (f"Measured with: {command(run)}", "Conditions around the run.")
    parts += map(latex_table, surroundings(run), captions)
    return "\n\n".join(parts) + "\n"


def latex_table_1(run: RunFile) -> str:
    """The study's first table: every method, its speed and what it holds of KV."""
    measured = {
        "throughput": "tokens/s",
        "speedup": "speedup",
        "mean_acceptance_length": "τ",
        "acceptance_rate": "accepted",
        "ttft_s": "TTFT ms",
        "tpot_s": "TPOT ms",
        "peak_cache_bytes": "KV MB",
    }
    rows = [[label(run, arm), *cells(run, arm, list(measured))] for arm in run.arms]
    told = (
        f"{title(run)}. Tokens/s: of all prompts, and the standard deviation between them; speedup: over ar, with its"
        " 95 % interval; τ: tokens a step; KV: the most that was held of keys and values."
    )
    grid = Grid([Column("method", figures=False), *map(Column, measured.values())], rows)
    return f"{PACKAGES}\n\n{latex_table(grid, told)}\n"


PACKAGES = "% \\usepackage[T1]{fontenc} \\usepackage{array,booktabs,graphicx}"
"""What the tables need, as a comment."""


def latex_table(grid: Grid, caption: str) -> str:
    """A table in LaTeX, no wider than the text."""
    kinds = {
        (True, False): "r",
        (True, True): "r",
        (False, False): "l",
        (False, True): ">{\\raggedright\\arraybackslash}p{10cm}",
    }
    rows = [" & ".join(map(_latex, row)) + " \\\\" for row in ([column.name for column in grid.columns], *grid.rows)]
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_latex(caption)}}}",
            # No wider than the text, and no larger than the text's letters.
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{{{''.join(kinds[column.figures, column.breaks] for column in grid.columns)}}}",
            *("\\toprule", rows[0], "\\midrule", *rows[1:], "\\bottomrule"),
            "\\end{tabular}}",
            "\\end{table}",
        ]
    )


_IN_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "{}$&#_%"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "τ": "$\\tau$", "Δ": "$\\Delta$"}
)


def _latex(text: str) -> str:
    """The text as it is: no command, no argument to the end of a row, and nothing that pdflatex has no letter for."""
    known = "".join(sign if sign < "\u0180" or sign in "τΔ" else "?" for sign in _one_line(text) if sign.isprintable())
    return f"{'{}' if known.startswith(('[', '*')) else ''}{known.translate(_IN_LATEX)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def failing_first(judgements: Sequence[Judgement]) -> list[Judgement]:
    """In the order in which a reader wants to know them."""
    order = [Verdict.REGRESSED, Verdict.MISSING, Verdict.INCONCLUSIVE, Verdict.NO_BASELINE, Verdict.WRONG_HARDWARE]
    order += [Verdict.NOT_JUDGED, Verdict.IMPROVED, Verdict.PASS]
    return sorted(judgements, key=lambda judged: order.index(judged.verdict))


def label(run: RunFile, arm: str) -> str:
    """The arm's name, and whether its results are synthetic."""
    return f"{arm} (synthetic)" if run.arms[arm].synthetic else arm


def outputs(run: RunFile, arm: str) -> str:
    """Whether the arm wrote what the baseline did, or, where it is lossy, what it must."""
    record = run.arms[arm]
    if record.bugs:
        return "WRONG"
    ties = f"{record.ties}/{record.total('runs'):.0f} ties" if record.ties else ""
    loops = "loops" if run.measures(arm).get("repetition", 0.0) >= LOOPS else ""
    if not record.lossy:
        return " ".join(filter(None, [ties or "equal", loops]))
    return " ".join(filter(None, ["lossy", *cells(run, arm, ["agreement"]), ties, loops]))


def plain(run: RunFile, arm: str) -> str | None:
    """The arm that decodes plainly with the same loss as a lossy one that drafts, if there is one."""
    options = run.arms[arm].options
    if not run.arms[arm].lossy or "drafter" not in options:
        return None
    wanted = {key: options[key] for key in _LOSS if key in options}
    return next((other for other, record in run.arms.items() if record.options == wanted), None)


def drafts(record: ArmRecord) -> bool:
    """Whether the arm proposes anything, as far as it is known: peers do not tell."""
    return len(record.histogram("depth")) > 1


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else ""
