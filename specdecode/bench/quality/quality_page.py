"""Show a run of the quality suite as a part of an HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from specdecode.bench.quality.curves import CURVES
from specdecode.bench.quality.quality_charts import (
    cache_styles,
    cost_by_speed,
    curve_chart,
    needle_tiles,
    perplexity_by_cache,
)
from specdecode.bench.quality.quality_tables import costs, margins, notes, retrieval, scores, title
from specdecode.bench.quality.tradeoff import about_speed, against_speed, tradeoff
from specdecode.bench.report.captions import label
from specdecode.bench.report.elements import Element, element, grid_table, scrolling, tile
from specdecode.bench.report.speed_charts import styles
from specdecode.bench.report.svg import card, legend
from specdecode.bench.runs.records import RunFile
from specdecode.evals.margins import MarginCheck
from specdecode.evals.results import QualityRun


def section(run: QualityRun, checks: Sequence[MarginCheck], speed: RunFile | None) -> list[Element]:
    """Make the section of one run.

    Args:
        run: that it is about.
        checks: of its margins.
        speed: a run of `pytest --benchmark` to compare with.
    """
    return [
        *_heading(run, checks),
        *_margins(checks),
        *_costs(run, checks),
        *_needles(run),
        *_tasks(run, checks),
        *(_against_speed(run, speed) if speed is not None else []),
        element("h2", "How it was judged"),
        _notes(notes(run)),
    ]


def _heading(run: QualityRun, checks: Sequence[MarginCheck]) -> list[Element]:
    """Name the run, and put what a reader looks for first into tiles."""
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


def _margins(checks: Sequence[MarginCheck]) -> list[Element]:
    """List the outcomes that are not as they have to be; all others are folded away."""
    parts = [element("h2", "Margins")]
    if wrong := [check for check in checks if check.unexpected]:
        parts.append(scrolling(grid_table(margins(wrong)), "Verdicts that are not as they have to be"))
    if rest := [check for check in checks if not check.unexpected]:
        summary = element("summary", f"{len(rest)} {'others' if wrong else 'verdicts'}")
        parts.append(element("details", summary, scrolling(grid_table(margins(rest)), "Verdicts")))
    return parts


def _costs(run: QualityRun, checks: Sequence[MarginCheck]) -> list[Element]:
    """Show what each arm costs: as a table, by the size of its cache, and along the documents."""
    parts = [element("h2", "Costs"), scrolling(grid_table(costs(run, checks)), "What each arm costs")]
    charts = {"Perplexity by cache size": perplexity_by_cache(run)}
    charts |= {curve.title: curve_chart(run, curve) for curve in CURVES}
    cards = [card([heading], chart) for heading, chart in charts.items() if chart is not None]
    if not cards:
        return parts
    looks = cache_styles(run.arms)
    explanation = (
        "Colours are cache policies; pale: a smaller cache; squares, dashes and dots: INT8; hollow, dotted: a negative"
        " control. Dashed: the full cache. KL is on a scale that is linear close to 0, and logarithmic above."
    )
    arms = legend({arm: looks[arm] for arm in run.judged_arms})
    return [*parts, element("p", explanation, class_="soft"), arms, element("div", *cards, class_="cards")]


def _needles(run: QualityRun) -> list[Element]:
    """Show which needles were found, by length and depth."""
    if not run.needles:
        return []
    arms = dict.fromkeys(trial.arm for trial in run.needles)
    explanation = "The fuller a tile, the more probable the tokens of the answer; in it, the needles that were found."
    return [
        element("h2", "Needles"),
        scrolling(grid_table(retrieval(run)), "Needles that were found"),
        element("p", explanation, class_="soft"),
        element("div", *(card([arm], needle_tiles(run, arm)) for arm in arms), class_="cards"),
    ]


def _tasks(run: QualityRun, checks: Sequence[MarginCheck]) -> list[Element]:
    """Show how many problems were solved."""
    if not run.answers:
        return []
    return [element("h2", "Tasks"), scrolling(grid_table(scores(run, checks)), "Problems that were solved")]


def _against_speed(run: QualityRun, speed: RunFile) -> list[Element]:
    """Show what the arms of a run of speeds cost, and what they gain."""
    parts = [
        element("h2", "Quality against speed"),
        _notes(about_speed(run, speed)),
        scrolling(grid_table(against_speed(run, speed)), "Quality against speed"),
    ]
    if points := tradeoff(run, speed).drawable:
        labels = {point.arm: label(speed, point.arm) for point in points}
        chart = scrolling(cost_by_speed(points, labels, styles(speed)), "Quality against speed")
        explanation = "With 95 % intervals. The line is the Pareto front: nothing is both faster and better."
        parts.append(card(["ΔNLL, nats a token: less is better"], chart, explanation))
    return parts


def _notes(sentences: Sequence[str]) -> Element:
    return element("ul", *(element("li", sentence) for sentence in sentences), class_="notes")
