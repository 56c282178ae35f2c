"""A table of how often each verdict was given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def verdict_table(corner: str, verdicts: Mapping[str, Counter[str]]) -> str:
    """Return a table in Markdown: a row for each kind of code, a column for each verdict that there was.

    Args:
        corner: what the rows are.
        verdicts: how often each was given, by kind.
    """
    names = sorted(set().union(*verdicts.values()))
    rows = [[corner, *names], *([kind, *(str(counts[name]) for name in names)] for kind, counts in verdicts.items())]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "--:|" * len(names), *lines[1:]])
