"""A run of the quality suite as a part of an HTML page, with its figures in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from specdecode.bench.quality.tables import costs, margins, notes, retrieval, scores, title
from specdecode.bench.quality.tradeoff import about_speed, against_speed
from specdecode.bench.report.elements import Element, element, grid_table, scrolling, tile
from specdecode.bench.runs.records import RunFile
from specdecode.evals.margins import MarginCheck
from specdecode.evals.results import QualityRun


def section(
    run: QualityRun, checks: Sequence[MarginCheck], speed: RunFile | None, pictures: Mapping[str, bytes], missing: str
) -> list[Element]:
    """What is told of one run.

    Args:
        run: that it is about.
        checks: on it.
        speed: a run of `pytest --benchmark` that is told beside.
        pictures: its figures, as PNG, by what they show.
        missing: why there are no others; empty if none is missing.
    """
    made = [*_heading(run, checks), *_verdicts(checks), element("h2", "Costs")]
    made.append(scrolling(grid_table(costs(run, checks)), "What each arm costs"))
    if run.needles:
        made += [element("h2", "Needles"), scrolling(grid_table(retrieval(run)), "Needles that were found")]
    if run.answers:
        made += [element("h2", "Tasks"), scrolling(grid_table(scores(run, checks)), "Problems that were solved")]
    if speed is not None:
        made += [element("h2", "Quality against speed"), _told(about_speed(run, speed))]
        made.append(scrolling(grid_table(against_speed(run, speed)), "Quality against speed"))
    made += [element("h2", "Figures"), *(_picture(shown, png) for shown, png in pictures.items())]
    if missing:
        made.append(element("p", missing, class_="soft"))
    return [*made, element("h2", "How it was judged"), _told(notes(run))]


def _heading(run: QualityRun, checks: Sequence[MarginCheck]) -> list[Element]:
    wrong, judged = sum(check.unexpected for check in checks), sum(check.outcome is not None for check in checks)
    if not judged:
        gate = tile("Margins", "warn", "Not judged", "no margin is set, or there is nothing to judge")
    elif wrong:
        gate = tile("Margins", "bad", f"✗ {wrong} of {judged}", "are not as they have to be: see below")
    else:
        gate = tile("Margins", "good", "✓ Kept", f"by all lossy parts; broken by all controls: {judged} verdicts")
    read = tile("Read", "", f"{len(run.documents)} documents", run.header.texts)
    plain = tile("Reference", "", f"PPL {run.perplexity():.3f}", "the full cache, with the weights as they are")
    lead = element("p", f"backend {run.header.backend}", class_="lead")
    return [
        element("header", element("h1", title(run)), lead),
        element("dl", gate, plain, read, class_="tiles"),
    ]


def _verdicts(checks: Sequence[MarginCheck]) -> list[Element]:
    """What is not as it has to be; all others, folded away."""
    made = [element("h2", "Margins")]
    if wrong := [check for check in checks if check.unexpected]:
        made.append(scrolling(grid_table(margins(wrong)), "Verdicts that are not as they have to be"))
    if rest := [check for check in checks if not check.unexpected]:
        summary = element("summary", f"{len(rest)} {'others' if wrong else 'verdicts'}")
        made.append(element("details", summary, scrolling(grid_table(margins(rest)), "Verdicts")))
    return made


def _picture(shown: str, png: bytes) -> Element:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    # As large as in print, twice: of 300 dots an inch, which the file's head counts.
    width = int.from_bytes(png[16:20], "big") // 2
    image = element("img", src=source, alt=shown, width=width)
    return element("figure", image, element("figcaption", shown), class_="card picture")


def _told(sentences: Sequence[str]) -> Element:
    return element("ul", *(element("li", each) for each in sentences), class_="notes")
