"""HTML pages as trees of elements, so that strings of a run file become text, and never mark-up."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from itertools import chain
from xml.etree import ElementTree

from specdecode.bench.report.grid import Column, Grid

Element = ElementTree.Element

# Browsers load nothing from outside of the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, *sections: Iterable[Element]) -> str:
    """Return a whole page, made of one or several sections."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", files("specdecode.bench.report").joinpath("page.css").read_text(encoding="utf-8")),
    )
    body = element("body", element("main", *chain.from_iterable(sections)))
    root = element("html", head, body, lang="en")
    return f"<!doctype html>\n{ElementTree.tostring(root, encoding='unicode', method='html')}\n"


def tile(name: str, kind: str, value: str, more: str) -> Element:
    """Return a tile for a key result of a run.

    Args:
        name: name of the result.
        kind: "good", "bad" or "warn"; empty for a neutral result.
        value: text in large letters.
        more: text in small letters.
    """
    described = element("dd", element("span", value, class_=kind), element("small", more))
    return element("div", element("dt", name), described, class_="tile")


def grid_table(grid: Grid) -> Element:
    """Return an HTML table. On the screen of a phone, `page.css` shows the rows of three columns or more as blocks."""
    rows = [[_cell(*place) for place in zip(grid.columns, row, strict=True)] for row in grid.rows]
    if len(grid.columns) < 3:
        return _table(grid, rows)
    for row in rows:
        for column, cell in zip(grid.columns, row, strict=True):
            cell.set("data-column", column.name)
    table = _table(grid, rows)
    table.set("class", "folds")
    return table


def wide_table(grid: Grid) -> Element:
    """Return an HTML table of many columns, in its frame: see `stacked`."""
    rows = [
        [
            pair(column.name, cell) if column.figures else _cell(column, cell)
            for column, cell in zip(grid.columns, row, strict=True)
        ]
        for row in grid.rows
    ]
    return stacked(_table(grid, rows))


def _table(grid: Grid, rows: Iterable[Iterable[Element]]) -> Element:
    heads = [head_cell(column.name, column.figures) for column in grid.columns]
    body = element("tbody", *(element("tr", *row) for row in rows))
    return element("table", element("thead", element("tr", *heads)), body)


def _cell(column: Column, text: str) -> Element:
    return element("td", text, class_="figure" if column.figures else "breaks" if column.breaks else "")


def pair(column: str, figure: str) -> Element:
    """Return a cell of a wide table: a figure, and what follows it in small letters, such as its interval.

    Where rows are blocks, `page.css` writes the name of the column beside it.
    """
    number, _, more = figure.partition(" ")
    return element("td", number, *([element("small", f" {more}")] if more else []), class_="figure", data_column=column)


def stacked(wide: Element) -> Element:
    """Put a table into a frame. On screens too narrow for it, `page.css` shows its rows as blocks."""
    wide.set("class", f"stacks {wide.get('class', '')}".rstrip())
    return element("div", wide, class_="frame")


def explanations(grid: Grid) -> Element:
    """Return the explanations of a table's columns as a list."""
    items = (element("div", element("dt", column.name), element("dd", column.about)) for column in grid.explained)
    return element("dl", *items, class_="columns")


def head_cell(name: str, figures: bool) -> Element:
    """Return the heading cell of a column."""
    return element("th", name, class_="figure" if figures else "", scope="col")


def scrolling(wide: Element, name: str) -> Element:
    """Put an element that may be wider than the screen into a frame that scrolls, also by keyboard."""
    return element("div", wide, class_="scroll", tabindex=0, role="region", aria_label=name)


def element(tag: str, /, *inside: Element | str, **attributes: object) -> Element:
    """Return a new element. `class_` and `http_equiv` stand for attributes that are no names in Python."""
    parent = Element(tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
    for part in inside:
        if isinstance(part, Element):
            parent.append(part)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + part
        else:
            parent.text = (parent.text or "") + part
    return parent
