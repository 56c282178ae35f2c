"""The start page of a folder: an HTML page with one row for each run, and links to the runs' own pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from specdecode.bench.gate.verdicts import Judgement
from specdecode.bench.report.captions import failing_first, label, models, type_of
from specdecode.bench.report.elements import Element, document, element, head_cell, stacked
from specdecode.bench.report.html import SIGNS, fastest, lossless_speedups
from specdecode.bench.runs.records import RunFile


class Chip(NamedTuple):
    """A short text on a coloured ground.

    Attributes:
        kind: "good", "bad" or "warn".
        text: the text, with a sign for readers who do not see colours.
    """

    kind: str
    text: str


class Entry(NamedTuple):
    """A run on the start page.

    Attributes:
        date: day of the run, as YYYY-MM-DD.
        models: name of the target, and of the draft if there is one.
        place: data type of the weights, and the hardware.
        preset: name of the preset.
        verdicts: counts of verdicts.
        fastest: fastest lossless arm and its speedup; empty for a run of quality.
    """

    date: str
    models: str
    place: str
    preset: str
    verdicts: list[Chip]
    fastest: str = ""


NOT_JUDGED = Chip("warn", "- not judged")
"""The chip of a run without a verdict."""


def speed_entry(run: RunFile, judgements: Sequence[Judgement]) -> Entry:
    """Return the entry of a run of speeds.

    Args:
        run: run to report.
        judgements: its verdicts.
    """
    identity = run.header.identity
    counts = Counter(judged.verdict for judged in failing_first(judgements))
    chips = [Chip(SIGNS[verdict][0], f"{SIGNS[verdict][1]} {n} {verdict.value}") for verdict, n in counts.items()]
    if wrong := sum(record.faulty for record in run.arms.values()):
        chips.insert(0, Chip("bad", f"✗ {wrong} arm{'s' if wrong > 1 else ''} without a right output"))
    lossless = lossless_speedups(run)
    best = fastest(lossless)
    return Entry(
        run.date,
        models(run),
        f"{type_of(identity)} on {identity.hardware}",
        identity.preset,
        chips or [NOT_JUDGED],
        f"{label(run, best)} {lossless[best]} over {run.baseline_of(best)}" if best else "none beyond the noise",
    )


def start_page(entries: Sequence[tuple[Entry, str]]) -> str:
    """Return the page.

    Args:
        entries: the runs in the order of the rows, each with the address of its own page.
    """
    heads = [head_cell(name, figures=False) for name in ("date", "models", "verdicts", *_PAIRS)]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *map(_row, entries)))
    title = f"{len(entries)} run{'s' if len(entries) > 1 else ''}"
    return document(title, [element("header", element("h1", title)), stacked(table)])


_PAIRS = ("fastest lossless arm", "type and hardware", "preset")
"""The columns that stand beside their cells where rows are blocks."""


def _row(entry_and_page: tuple[Entry, str]) -> Element:
    entry, page = entry_and_page
    chips = [element("span", chip.text, class_=f"chip {chip.kind}") for chip in entry.verdicts]
    return element(
        "tr",
        element("td", entry.date),
        element("th", element("a", entry.models, href=page), scope="row", class_="breaks"),
        element("td", *chips, class_="chips"),
        *(
            element("td", text, data_column=column, class_="breaks")
            for column, text in zip(_PAIRS, (entry.fastest, entry.place, entry.preset), strict=True)
        ),
    )
