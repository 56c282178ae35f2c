"""Build HTML pages as trees of elements, so that whatever a run file says becomes text, and never mark-up."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from itertools import chain
from xml.etree import ElementTree

from specdecode.bench.report.grid import Grid

Element = ElementTree.Element

# Nothing but what is in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, *sections: Iterable[Element]) -> str:
    """Write the whole page, of one section or several."""
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
    """Make a tile for one of the few things that a reader is to see first.

    Args:
        name: of the thing.
        kind: "good", "bad" or "warn"; empty where it is none of these.
        value: in large letters.
        more: in small ones.
    """
    described = element("dd", element("span", value, class_=kind), element("small", more))
    return element("div", element("dt", name), described, class_="tile")


def grid_table(grid: Grid) -> Element:
    """Make a table."""
    heads = [head_cell(column.name, column.figures) for column in grid.columns]
    kinds = ["figure" if column.figures else "breaks" if column.breaks else "" for column in grid.columns]
    rows = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in grid.rows
    ]
    return element("table", element("thead", element("tr", *heads)), element("tbody", *rows))


def head_cell(name: str, figures: bool) -> Element:
    """Make the head of a column."""
    return element("th", name, class_="figure" if figures else "", scope="col")


def scrolling(wide: Element, name: str) -> Element:
    """Put what may be wider than the screen into a frame that scrolls, by keyboard too."""
    return element("div", wide, class_="scroll", tabindex=0, role="region", aria_label=name)


def element(tag: str, /, *inside: Element | str, **attributes: object) -> Element:
    """Make an element; `class_` and `http_equiv` stand for the attributes that Python cannot spell."""
    parent = Element(tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
    for part in inside:
        if isinstance(part, Element):
            parent.append(part)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + part
        else:
            parent.text = (parent.text or "") + part
    return parent
