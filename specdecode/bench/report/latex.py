"""Tables of a run of speeds in LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import Judgement
from specdecode.bench.report.captions import (
    cells,
    columns,
    command,
    label,
    notes,
    one_line,
    output_column,
    outputs,
    title,
)
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.load import by_concurrency, losses
from specdecode.bench.report.tables import details, speeds, surroundings, verdicts
from specdecode.bench.runs.records import RunFile


def latex(
    run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], past: History | None = None
) -> str:
    """Return the tables for a paper, to be included with \\input. The arguments are those of `markdown`.

    The history is left out: it has a column for each arm, too many for a page.
    """
    parts = [PACKAGES]
    if judgements:
        judged = verdicts(judgements)
        parts.append(latex_table(judged, f"Verdicts: {title}. {judged_by} {judged.explanations}"))
    measured = speeds(run)
    about = [] if judgements else [judged_by]
    parts.append(latex_table(measured, " ".join([f"Speed: {title}.", *about, measured.explanations, *notes(run)])))
    if (loads := by_concurrency(run)).rows:
        parts.append(latex_table(loads, " ".join([f"By concurrency: {title}. {loads.explanations}", *losses(run)])))
    parts += [latex_table(grid, f"{heading}: {title}. {grid.explanations}") for heading, grid in details(run).items()]
    parts += map(
        latex_table, surroundings(run), (f"Measured with: {command(run)}", "Conditions before and after the run.")
    )
    return "\n\n".join(parts) + "\n"


def latex_table_1(run: RunFile) -> str:
    """Return the study's first table: the speed, the KV size and the check of the outputs of every method."""
    measured = ["throughput", "speedup", "mean_acceptance_length", "acceptance_rate", "ttft_s", "tpot_s"]
    measured.append("peak_cache_bytes")
    rows = [[label(run, arm), *cells(run, arm, measured), outputs(run, arm)] for arm in run.arms]
    heads = [Column("method", figures=False), *columns(run, measured), output_column(run, run.arms)]
    grid = Grid(heads, rows)
    return f"{PACKAGES}\n\n{latex_table(grid, f'{title(run)}. {grid.explanations}')}\n"


PACKAGES = "% \\usepackage[T1]{fontenc} \\usepackage{array,booktabs,graphicx}"
"""The packages that the tables need, as a LaTeX comment."""


def latex_table(grid: Grid, caption: str) -> str:
    """Return a table in LaTeX, no wider than the text."""
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
            # Wide tables shrink to the width of the text; narrow ones keep their letter size.
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
    """Escape a text: no command, no "[" or "*" that a row's end takes as an argument, no letter unknown to pdflatex."""
    known = "".join(sign if sign < "\u0180" or sign in "τΔ" else "?" for sign in one_line(text) if sign.isprintable())
    return f"{'{}' if known.startswith(('[', '*')) else ''}{known.translate(_IN_LATEX)}"
