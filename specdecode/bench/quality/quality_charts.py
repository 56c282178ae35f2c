"""Charts of a run of the quality suite for its HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdecode.bench.quality.curves import KL_THRESHOLD_NATS, Curve
from specdecode.bench.quality.tradeoff import Point
from specdecode.bench.report.elements import Element
from specdecode.bench.report.palette import cache_traits
from specdecode.bench.report.svg import (
    Scale,
    Style,
    axes,
    drawing,
    line,
    linear_scale,
    log_scale,
    log_scale_with_zero,
    mark,
    names,
    path,
    rectangle,
    series,
    text,
)
from specdecode.bench.runs.statistics import Estimate, pareto_front, staircase
from specdecode.evals.results import QualityRun

# The plot of a card, in pixels: its size, and the place of its axes.
_WIDTH, _HEIGHT = 300, 186
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 292.0, 10.0, 152.0
_WIDE_WIDTH, _WIDE_HEIGHT = 640, 330


def cache_styles(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
    """Return the styles of the quality suite's arms, from their preset entries.

    The colour shows the cache policy; a paler colour is a smaller cache. Squares on dash-dot lines are INT8. Hollow
    marks on dotted lines are negative controls.
    """
    looks = {}
    for arm, traits in cache_traits(arms).items():
        dash = "2 3" if traits.control else "8 3 2 3" if traits.quantized else "" if traits.policy else "6 4"
        colour = "plain" if traits.place is None else f"c{traits.place}"
        looks[arm] = Style(colour, traits.control, traits.quantized, dash, 1 - 0.75 * traits.fade)
    return looks


def perplexity_by_cache(run: QualityRun) -> Element | None:
    """Draw perplexity against cache size, with a dashed line for the full cache; None without a bounded cache."""
    families = run.by_cache()
    if not families:
        return None
    looks = cache_styles(run.arms)
    sizes = sorted({run.arms[arm]["cache"] for arms in families.values() for arm in arms})
    values = {arm: run.perplexity(arm) for arms in families.values() for arm in arms}
    full = run.perplexity()
    x = Scale(float, -0.5, len(sizes) - 0.5, _LEFT, _RIGHT, [])
    y = log_scale([full, *values.values()], _BOTTOM, _TOP, least=math.log(1.1))
    parts = axes(x, y, [(x(place), f"{size:,}") for place, size in enumerate(sizes)], "cache, tokens")
    parts.append(series(Style("plain"), path([(x.start, y(full)), (x.end, y(full))], dash="6 4")))
    said = [f"full cache {full:.3f}"]
    for number, (name, arms) in enumerate(families.items()):
        # Shifted sideways, so that no mark hides another.
        beside = 0.5 * (number + 0.5) / len(families) - 0.25
        points = [(x(sizes.index(run.arms[arm]["cache"]) + beside), y(values[arm])) for arm in arms]
        # A line joins several cache sizes, so it has no tone of a size.
        look = looks[arms[0]]._replace(opacity=1.0)
        parts.append(series(look, path(points, dash=look.dash), *(mark(*point, look) for point in points)))
        said += [f"{name}, cache {run.arms[arm]['cache']:,}: {values[arm]:.3f}" for arm in arms]
    return drawing(_WIDTH, _HEIGHT, "Perplexity by cache size", "; ".join(said), *parts)


def curve_chart(run: QualityRun, curve: Curve) -> Element | None:
    """Draw a measure along the documents, a line for each arm; None if no arm has values."""
    points = {arm: run.curve(arm, curve.measure, curve.along) for arm in run.judged_arms} if run.documents else {}
    points = {arm: places for arm, places in points.items() if places}
    if not points:
        return None
    values = [value for places in points.values() for _, value in places]
    x = linear_scale(0.0, max(place for places in points.values() for place, _ in places), _LEFT, _RIGHT)
    if curve.measure == "agrees":
        y = linear_scale(min(math.floor(20 * min(values)) / 20, 0.95), 1.0, _BOTTOM, _TOP)
    elif max(values) > KL_THRESHOLD_NATS:
        y = log_scale_with_zero(max(values), _BOTTOM, _TOP, KL_THRESHOLD_NATS)
    else:
        y = linear_scale(0.0, KL_THRESHOLD_NATS, _BOTTOM, _TOP)
    parts = axes(x, y, [(x(tick), f"{tick:,g}") for tick in x.ticks if tick.is_integer()], curve.x_name)
    for arm, look in cache_styles(run.arms).items():
        if arm in points:
            curve_line = path([(x(place), y(value)) for place, value in points[arm]], dash=look.dash)
            parts.append(series(look, curve_line))
    said = "; ".join(f"{arm} from {places[0][1]:.3g} to {places[-1][1]:.3g}" for arm, places in points.items())
    return drawing(_WIDTH, _HEIGHT, curve.title, said, *parts)


def needle_tiles(run: QualityRun, arm: str) -> Element:
    """Draw a tile for each length and depth of the needles that an arm looked for.

    A stronger colour means more probable tokens of the answer. The text in a tile counts the found needles.
    """
    cells = run.needle_cells(arm)
    lengths, depths = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    width, height, gap = (_RIGHT - _LEFT) / len(lengths), 24.0, 2.0
    bottom = _TOP + height * len(depths)
    parts = []
    for (length, depth), cell in cells.items():
        left, top = _LEFT + width * lengths.index(length), _TOP + height * depths.index(depth)
        size = {"fill_opacity": f"{0.08 + 0.92 * cell.token_probability:.2f}"}
        parts.append(rectangle(left, top, width - gap, height - gap, "level", **size))
        ink = "on-level" if cell.token_probability > 0.55 else "value"
        middle = left + (width - gap) / 2
        parts.append(text(middle, top + 15, f"{cell.found}/{cell.count}", text_anchor="middle", class_=ink))
    parts += [
        text(_LEFT - 6, _TOP + height * (place + 0.5) + 3, f"{depth:g}", text_anchor="end")
        for place, depth in enumerate(depths)
    ]
    parts += [
        text(_LEFT + width * (place + 0.5) - gap / 2, bottom + 13, f"{length:,}", text_anchor="middle")
        for place, length in enumerate(lengths)
    ]
    parts.append(
        text((_LEFT + _RIGHT) / 2, bottom + 28, "length, tokens; depth from top to bottom", text_anchor="middle")
    )
    said = "; ".join(
        f"length {length}, depth {depth:g}: {cell.found} of {cell.count}, probability {cell.token_probability:.2f}"
        for (length, depth), cell in cells.items()
    )
    return drawing(_WIDTH, bottom + 32, f"Needles that {arm} found", said, *parts, colour="c0")


def cost_by_speed(
    points: Sequence[Point], baseline: str, labels: Mapping[str, str], looks: Mapping[str, Style]
) -> Element:
    """Draw ΔNLL against the speedup, each with its interval, and the Pareto front.

    Args:
        points: at least one.
        baseline: name of the arm that the speedups are over.
        labels, looks: name and style of each point's arm.
    """
    x = _around([end for point in points for end in _ends(point.speedup)], 52.0, _WIDE_WIDTH - 16.0)
    y = _around([end for point in points for end in _ends(point.cost)], _WIDE_HEIGHT - 44.0, 12.0)
    places = {point.arm: (x(point.speedup.value), y(point.cost.value)) for point in points}
    front = pareto_front({point.arm: (point.speedup.value, -point.cost.value) for point in points})
    parts = axes(x, y, [(x(tick), f"{tick:g}") for tick in x.ticks], f"speedup over {baseline}")
    parts.append(path(staircase([places[arm] for arm in front], x.start, y.end), "front"))
    for point in points:
        across, up = places[point.arm]
        bars = []
        if point.speedup.bounded:
            bars.append(line(x(point.speedup.low), up, x(point.speedup.high), up, "spread"))
        if point.cost.bounded:
            bars.append(line(across, y(point.cost.low), across, y(point.cost.high), "spread"))
        parts.append(series(looks[point.arm], *bars, mark(across, up, looks[point.arm], 4)))
    named = {labels[arm]: places[arm] for arm in [*front[::-1], *places]}
    parts += names(named, x.start, x.end)
    said = "; ".join(f"{point.arm}: speedup {point.speedup:.2f}, ΔNLL {point.cost:.4f}" for point in points)
    chart = drawing(_WIDE_WIDTH, _WIDE_HEIGHT, f"ΔNLL by speedup over {baseline}", said, *parts)
    chart.set("style", f"width: {_WIDE_WIDTH / 16:g}rem")
    return chart


def _ends(estimate: Estimate) -> list[float]:
    """Return the values that a scale must include."""
    return [estimate.value, *((estimate.low, estimate.high) if estimate.bounded else ())]


def _around(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a linear scale that includes all values, with margins."""
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.1
    return linear_scale(low - margin, high + margin, start, end)
