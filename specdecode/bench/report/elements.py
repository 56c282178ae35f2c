"""What HTML pages are made of: a tree of elements, so that whatever stands in a run file becomes text, never
mark-up."""

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
    """The whole page, of one section or several."""
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
    """One of the few things that a reader is to see first.

    Args:
        name: what is told.
        kind: "good", "bad" or "warn"; empty where it is none of these.
        value: in large letters.
        more: in small ones.
    """
    described = element("dd", element("span", value, class_=kind), element("small", more))
    return element("div", element("dt", name), described, class_="tile")


def grid_table(grid: Grid) -> Element:
    """A table."""
    heads = [head_cell(column.name, column.figures) for column in grid.columns]
    kinds = ["figure" if column.figures else "breaks" if column.breaks else "" for column in grid.columns]
    rows = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in grid.rows
    ]
    return element("table", element("thead", element("tr", *heads)), element("tbody", *rows))


def head_cell(name: str, figures: bool) -> Element:
    """The head of a column."""
    return element("th", name, class_="figure" if figures else "", scope="col")


def scrolling(wide: Element, name: str) -> Element:
    """Put what may be wider than the screen into a frame that scrolls, by keyboard too."""
    return element("div", wide, class_="scroll", tabindex=0, role="region", aria_label=name)


def element(tag: str, /, *inside: Element | str, **attributes: object) -> Element:
    """An element; `class_` and `http_equiv` stand for the attributes that Python cannot spell."""
    made = Element(tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
    for part in inside:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + part
        else:
            made.text = (made.text or "") + part
    return made
