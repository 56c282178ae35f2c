"""A run of the quality suite as a part of an HTML page, with its figures in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from specdecode.bench.quality.tables import costs, margins, notes, retrieval, scores, title, unexpected
from specdecode.bench.quality.tradeoff import about_speed, against_speed
from specdecode.bench.report.elements import Element, element, grid_table, scrolling, tile
from specdecode.bench.runs.records import RunFile
from specdecode.evals.results import Judgement, QualityRun


def section(
    run: QualityRun, judgements: Sequence[Judgement], speed: RunFile | None, pictures: Mapping[str, bytes], missing: str
) -> list[Element]:
    """What is told of one run.

    Args:
        run: that it is about.
        judgements: on it.
        speed: a run of `pytest --benchmark` that is told beside.
        pictures: its figures, as PNG, by what they show.
        missing: why there are no others; empty if none is missing.
    """
    made = [*_heading(run, judgements), *_verdicts(judgements), element("h2", "Costs")]
    made.append(scrolling(grid_table(costs(run, judgements)), "What each arm costs"))
    if run.needles:
        made += [element("h2", "Needles"), scrolling(grid_table(retrieval(run)), "Needles that were found")]
    if run.answers:
        made += [element("h2", "Tasks"), scrolling(grid_table(scores(run, judgements)), "Problems that were solved")]
    if speed is not None:
        made += [element("h2", "Quality against speed"), _told(about_speed(run, speed))]
        made.append(scrolling(grid_table(against_speed(run, speed)), "Quality against speed"))
    made += [element("h2", "Figures"), *(_picture(shown, png) for shown, png in pictures.items())]
    if missing:
        made.append(element("p", missing, class_="soft"))
    return [*made, element("h2", "How it was judged"), _told(notes(run))]


def _heading(run: QualityRun, judgements: Sequence[Judgement]) -> list[Element]:
    wrong, judged = unexpected(judgements), sum(each.verdict is not None for each in judgements)
    if not judged:
        gate = tile("Margins", "warn", "Not judged", "no margin is set, or there is nothing to judge")
    elif wrong:
        gate = tile("Margins", "bad", f"✗ {len(wrong)} of {judged}", "are not as they have to be: see below")
    else:
        gate = tile("Margins", "good", "✓ Kept", f"by all lossy parts; broken by all controls: {judged} verdicts")
    read = tile("Read", "", f"{len(run.documents)} documents", run.header["texts"])
    plain = tile("Reference", "", f"PPL {run.perplexity():.3f}", "the full cache, with the weights as they are")
    lead = element("p", f"backend {run.header['backend']}", class_="lead")
    return [
        element("header", element("h1", title(run)), lead),
        element("dl", gate, plain, read, class_="tiles"),
    ]


def _verdicts(judgements: Sequence[Judgement]) -> list[Element]:
    """What is not as it has to be; all others, folded away."""
    made = [element("h2", "Margins")]
    if wrong := unexpected(judgements):
        made.append(scrolling(grid_table(margins(wrong)), "Verdicts that are not as they have to be"))
    if rest := [each for each in judgements if each not in wrong]:
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
