"""Tables before they get an output format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

_LEAST_TEXT = 20
"""The least width of a column of texts, which may break within words."""

_FRAME = 3  # characters: a line, and a space on either side of a cell


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


def rich_table(grid: Grid, sentences: Sequence[str] = ()) -> Table:
    """Return a table for a terminal, with the explanations of its columns and further sentences below it.

    Print it with `crop=False`: it may be wider than the terminal (see `_Uncut`).
    """
    table = _Uncut(caption=Text("\n".join(filter(None, [grid.explanations, *sentences]))), caption_justify="left")
    for column, *cells in zip(grid.columns, *grid.rows, strict=True):
        split = str.split if column.breaks else str.splitlines
        longest = max((cell_len(part) for text in (column.name, *cells) for part in split(text)), default=0)
        table.add_column(
            Text(column.name),
            justify="right" if column.figures else "left",
            no_wrap=not column.breaks,
            min_width=longest if column.figures or not column.breaks else min(longest, _LEAST_TEXT),
        )
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


class _Uncut(Table):
    """A table that cuts no figure on a narrow terminal: a figure without its end is another figure."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Any:
        least = sum((column.min_width or 0) + _FRAME for column in self.columns) + 1
        return super().__rich_console__(console, options.update(max_width=max(options.max_width, least)))
