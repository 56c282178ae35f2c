"""A run of the quality suite as a section of an HTML page."""

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
from specdecode.bench.report.elements import Element, element, explanations, grid_table, scrolling, tile, wide_table
from specdecode.bench.report.speed_charts import styles
from specdecode.bench.report.start_page import NOT_JUDGED, Chip, Entry
from specdecode.bench.report.svg import card, legend
from specdecode.bench.runs.records import RunFile
from specdecode.evals.margins import MarginCheck
from specdecode.evals.results import QualityRun


def section(run: QualityRun, checks: Sequence[MarginCheck], speed: RunFile | None) -> list[Element]:
    """Return the section of one run.

    Args:
        run: run to report.
        checks: checks of its margins.
        speed: a run of `pytest --benchmark` to compare with; None to leave this out.
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


def entry(run: QualityRun, checks: Sequence[MarginCheck], date: str) -> Entry:
    """Return the entry of one run on the start page.

    Args:
        run: run to report.
        checks: checks of its margins.
        date: day of the run, as YYYY-MM-DD.
    """
    header = run.header
    wrong, judged = _counts(checks)
    chip = Chip("bad", f"✗ {wrong} of {judged} margins fail") if wrong else Chip("good", f"✓ {judged} margins kept")
    hardware = header.versions.get("gpu", header.versions.get("cpu"))
    place = f"{header.dtype} on {hardware}" if hardware else header.dtype
    return Entry(date, header.target, place, f"{header.preset} (quality)", [chip if judged else NOT_JUDGED])


def _counts(checks: Sequence[MarginCheck]) -> tuple[int, int]:
    """Return the numbers of margins with an unexpected outcome, and with any outcome."""
    return sum(check.unexpected for check in checks), sum(check.outcome is not None for check in checks)


def _heading(run: QualityRun, checks: Sequence[MarginCheck]) -> list[Element]:
    """Return the title of the run, and tiles with its key results."""
    wrong, judged = _counts(checks)
    without = len({check.arm for check in checks} - {check.arm for check in checks if check.outcome is not None})
    if not judged:
        gate = tile("Margins", "warn", "Not judged", "no margin is set, or there is nothing to judge")
    elif wrong:
        gate = tile("Margins", "bad", f"✗ {wrong} of {judged}", "have an unexpected outcome: see below")
    else:
        unjudged = f"; arms without a margin: {without}" if without else ""
        gate = tile("Margins", "good", "✓ Kept", f"{judged} verdict(s) as expected{unjudged}")
    read = tile("Read", "", f"{len(run.documents)} documents", run.header.texts)
    plain = tile("Reference", "", f"PPL {run.perplexity():.3f}", "the full cache, with unquantised weights")
    lead = element("p", f"backend {run.header.backend}", class_="lead")
    return [
        element("header", element("h1", title(run)), lead),
        element("dl", gate, plain, read, class_="tiles"),
    ]


def _margins(checks: Sequence[MarginCheck]) -> list[Element]:
    """List the unexpected outcomes. All others are folded away."""
    parts = [element("h2", "Margins")]
    if wrong := [check for check in checks if check.unexpected]:
        parts += [scrolling(grid_table(margins(wrong)), "Unexpected verdicts"), explanations(margins(wrong))]
    if rest := [check for check in checks if not check.unexpected]:
        summary = element("summary", f"{len(rest)} {'others' if wrong else 'verdicts'}")
        table = scrolling(grid_table(margins(rest)), "Verdicts")
        parts.append(element("details", summary, table, explanations(margins(rest))))
    return parts


def _costs(run: QualityRun, checks: Sequence[MarginCheck]) -> list[Element]:
    """Return the costs of each arm: as a table, by the size of its cache, and along the documents."""
    grid = costs(run, checks)
    parts = [element("h2", "Costs"), wide_table(grid), explanations(grid)]
    charts = {"Perplexity by cache size": perplexity_by_cache(run)}
    charts |= {curve.title: curve_chart(run, curve) for curve in CURVES}
    cards = [card([heading], chart) for heading, chart in charts.items() if chart is not None]
    if not cards:
        return parts
    looks = cache_styles(run.arms)
    explanation = (
        "Colours: cache policies. Pale: a smaller cache. Squares on dash-dot lines: INT8. Hollow marks on dotted lines:"
        " negative controls. Dashed: the full cache. The scale of KL is linear near 0, and logarithmic above."
    )
    arms = legend({arm: looks[arm] for arm in run.judged_arms})
    return [*parts, element("p", explanation, class_="soft"), arms, element("div", *cards, class_="cards")]


def _needles(run: QualityRun) -> list[Element]:
    """Return the found needles, by length and depth."""
    if not run.needles:
        return []
    arms, grid = dict.fromkeys(trial.arm for trial in run.needles), retrieval(run)
    explanation = (
        "A stronger colour means more probable tokens of the answer. The text in a tile counts the found needles."
    )
    return [
        element("h2", "Needles"),
        scrolling(grid_table(grid), "Found needles"),
        explanations(grid),
        element("p", explanation, class_="soft"),
        element("div", *(card([arm], needle_tiles(run, arm)) for arm in arms), class_="cards"),
    ]


def _tasks(run: QualityRun, checks: Sequence[MarginCheck]) -> list[Element]:
    """Return the numbers of solved problems."""
    if not run.answers:
        return []
    grid = scores(run, checks)
    return [element("h2", "Tasks"), wide_table(grid), explanations(grid)]


def _against_speed(run: QualityRun, speed: RunFile) -> list[Element]:
    """Return the costs and the speedups of the arms of a run of speeds."""
    grid = against_speed(run, speed)
    parts = [
        element("h2", "Quality against speed"),
        _notes(about_speed(run, speed)),
        scrolling(grid_table(grid), "Quality against speed"),
        explanations(grid),
    ]
    if points := tradeoff(run, speed).drawable:
        labels = {point.arm: label(speed, point.arm) for point in points}
        chart = scrolling(cost_by_speed(points, speed.header.baseline, labels, styles(speed)), "Quality against speed")
        explanation = (
            "With 95 % intervals. The line is the Pareto front: no arm is both faster and better than an arm on it."
        )
        parts.append(card(["ΔNLL, nats a token: lower is better"], chart, explanation))
    return parts


def _notes(sentences: Sequence[str]) -> Element:
    return element("ul", *(element("li", sentence) for sentence in sentences), class_="notes")
