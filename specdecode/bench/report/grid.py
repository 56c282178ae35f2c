"""Tables that have no format yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table
from rich.text import Text


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


def rich_table(grid: Grid) -> Table:
    """Make a table for a terminal."""
    table = Table()
    for column in grid.columns:
        table.add_column(column.name, justify="right" if column.figures else "left", no_wrap=not column.breaks)
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table
