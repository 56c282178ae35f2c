"""Tables before they get an output format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table
from rich.text import Text


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: heading.
        figures: whether its cells are figures, which are right-aligned.
        breaks: whether cells and heading may span lines.
        about: the meaning of its cells, in a few words; empty if the heading says it all.
    """

    name: str
    figures: bool = True
    breaks: bool = False
    about: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it gets an output format. Its cells are not escaped: the writer of a format escapes them."""

    columns: list[Column]
    rows: list[list[str]]

    @property
    def explained(self) -> list[Column]:
        """The columns to explain below the table: those with an explanation, and a cell that is not empty."""
        filled = [any(cells) for cells in zip(*self.rows, strict=True)]
        return [column for column, any_cell in zip(self.columns, filled, strict=False) if any_cell and column.about]

    @property
    def explanations(self) -> str:
        """The explanations of the columns as a paragraph, one sentence for each."""
        return " ".join(f"{column.name}: {column.about}." for column in self.explained)


def rich_table(grid: Grid) -> Table:
    """Return a table for a terminal."""
    table = Table()
    for column in grid.columns:
        table.add_column(column.name, justify="right" if column.figures else "left", no_wrap=not column.breaks)
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table
