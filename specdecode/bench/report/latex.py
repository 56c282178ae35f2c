"""Write a run of speeds in LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement
from specdecode.bench.report.captions import MEMORY, MODEL, cells, command, label, notes, one_line, title
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.load import LOAD, by_concurrency, losses
from specdecode.bench.report.tables import acceptance, by_model, by_part, memory, speeds, surroundings, verdicts
from specdecode.bench.runs.records import RunFile


def latex(
    run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], past: History | None = None
) -> str:
    """Write the tables for a paper, to be put in with \\input; arguments as for `markdown`.

    The history is left out: a column for each arm is more than fits on a page.
    """
    parts = [PACKAGES]
    if judgements:
        parts.append(latex_table(verdicts(judgements), f"Verdicts: {title}. {judged_by}"))
    parts.append(
        latex_table(speeds(run), " ".join([f"Speed: {title}.", *([] if judgements else [judged_by]), *notes(run)]))
    )
    if (loads := by_concurrency(run)).rows:
        parts.append(latex_table(loads, " ".join([f"By concurrency: {title}. {LOAD}", *losses(run)])))
    if (split := by_part(run)).rows:
        parts.append(latex_table(split, f"By task and length of the output: {title}."))
    if (accepted := acceptance(run)).rows:
        parts.append(latex_table(accepted, f"Share of the proposals at a position that were accepted: {title}."))
    if (predicted := by_model(run)).rows:
        parts.append(latex_table(predicted, f"Speedup over {run.compared_with} by the model: {title}. {MODEL}"))
    if (memories := memory(run)).rows:
        parts.append(latex_table(memories, f"Memory: {title}. {MEMORY}"))
    captions = (f"Measured with: {command(run)}", "Conditions around the run.")
    parts += map(latex_table, surroundings(run), captions)
    return "\n\n".join(parts) + "\n"


def latex_table_1(run: RunFile) -> str:
    """Write the study's first table: every method, its speed and the KV that it holds."""
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
    caption = (
        f"{title(run)}. Tokens/s: of all prompts, and the standard deviation between them; speedup: over"
        f" {run.compared_with}, with its 95 % interval; τ: tokens a step; KV: the most that was held of keys and"
        " values."
    )
    grid = Grid([Column("method", figures=False), *map(Column, measured.values())], rows)
    return f"{PACKAGES}\n\n{latex_table(grid, caption)}\n"


PACKAGES = "% \\usepackage[T1]{fontenc} \\usepackage{array,booktabs,graphicx}"
"""What the tables need, as a comment."""


def latex_table(grid: Grid, caption: str) -> str:
    """Write a table in LaTeX, no wider than the text."""
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
    """Escape a text: no command, no argument to the end of a row, and nothing that pdflatex has no letter for."""
    known = "".join(sign if sign < "\u0180" or sign in "τΔ" else "?" for sign in one_line(text) if sign.isprintable())
    return f"{'{}' if known.startswith(('[', '*')) else ''}{known.translate(_IN_LATEX)}"
