"""A table with the counts of verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.markdown import markdown_table


def verdict_table(corner: str, verdicts: Mapping[str, Counter[str]]) -> str:
    """Return a table in Markdown: a row for each kind of code, a column for each verdict that was given.

    Args:
        corner: heading of the column of kinds.
        verdicts: counts of the verdicts, by kind of code.
    """
    names = sorted(set().union(*verdicts.values()))
    rows = [[kind, *(str(counts[name]) for name in names)] for kind, counts in verdicts.items()]
    return markdown_table(Grid([Column(corner, figures=False), *map(Column, names)], rows))
