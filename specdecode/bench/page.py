"""A run as one HTML page that needs nothing else: no script, no font, no network.

The page is built as a tree of elements, so that whatever stands in a run file becomes text, never mark-up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from importlib.resources import files
from xml.etree import ElementTree

from specdecode.bench.blame import Blame
from specdecode.bench.gate import FAILING, Judgement, Verdict
from specdecode.bench.history import History
from specdecode.bench.names import BASELINE, PEER_BASELINE
from specdecode.bench.report import (
    Grid,
    command,
    drafts,
    failing_first,
    label,
    notes,
    outputs,
    past_speedups,
    speeds,
    surroundings,
    timeline,
)
from specdecode.bench.runs import RunFile
from specdecode.bench.stats import Ratio

Element = ElementTree.Element

_COLOURS = 7
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_SIGNS = {
    Verdict.REGRESSED: ("bad", "✗"),
    Verdict.MISSING: ("bad", "✗"),
    Verdict.INCONCLUSIVE: ("warn", "?"),
    Verdict.NO_BASELINE: ("warn", "+"),
    Verdict.WRONG_HARDWARE: ("warn", "≠"),
    Verdict.IMPROVED: ("good", "▲"),
    Verdict.PASS: ("good", "✓"),
}
"""The colour of a verdict, and its sign for those who do not see colours."""


def page(run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], past: History) -> str:
    """The whole page; arguments as for `report.markdown`."""
    colours = _colours(run)
    head = _element(
        "head",
        _element("meta", charset="utf-8"),
        _element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _element("title", title),
        _element("style", files("specdecode.bench").joinpath("page.css").read_text(encoding="utf-8")),
    )
    body = _element(
        "body",
        *_heading(run),
        _element("main", *_tiles(run, judgements), *_verdicts(judged_by, judgements), *_speeds(run, colours)),
    )
    main = body[-1]
    main.extend([*_acceptance(run, colours), *_history(run, past, colours), *_about(run)])
    root = _element("html", head, body, lang="en")
    return f"<!doctype html>\n{ElementTree.tostring(root, encoding='unicode', method='html')}\n"


def _element(name: str, *inside: Element | str, **attributes: object) -> Element:
    """An element; `class_` and `http_equiv` stand for the attributes that Python cannot spell."""
    made = Element(name, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
    for part in inside:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + part
        else:
            made.text = (made.text or "") + part
    return made
