"""A run of the quality suite in figures for print: `specdecode report RUN --figures DIR`. From its file alone, and for
quality against speed from one of `pytest --benchmark`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from specdecode.bench.quality.tables import title
from specdecode.bench.quality.tradeoff import tradeoff
from specdecode.bench.report.captions import label
from specdecode.bench.report.drawing import (
    COLUMN,
    PAGE,
    Look,
    cache_looks,
    figure,
    in_print,
    label_points,
    legend,
    lighter,
    looks,
    rendered,
    save,
    text,
)
from specdecode.bench.report.figures import how_drawn, name_axes, panels_of, pareto_front
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import Estimate
from specdecode.evals.results import QualityRun

_CURVES = (
    ("kl", "position", "KL, nats a token", "position, tokens"),
    ("kl", "since", "KL, nats a token", "tokens since the last eviction"),
    ("agrees", "position", "top-1 agreement", "position, tokens"),
)
# Below this KL is drawn on a linear scale, as it may be 0.
_SMALL = 0.01


def write(run: QualityRun, folder: Path, speed: RunFile | None = None) -> dict[str, str]:
    """Write the figures that a run has what it needs for, as PDF and as PNG.

    Returns:
        For each figure an empty text, or in a few words why there is none.
    """
    return save(draw(run, speed), folder, title(run))


def draw(run: QualityRun, speed: RunFile | None = None) -> dict[str, Figure | str]:
    """Each figure by its name, or in a few words why there is none."""
    with in_print():
        drawn = {name: make(run) for name, make in _FIGURES.items()}
        why = "no run of speeds was given (--speed)"
        return drawn | {"cost-against-speed": why if speed is None else cost_against_speed(run, speed)}


def pictures(run: QualityRun, speed: RunFile | None = None) -> dict[str, bytes]:
    """The figures as PNG, by what they show."""
    drawn = draw(run, speed).items()
    return {_CAPTIONS[name]: rendered(of, "png", title(run)) for name, of in drawn if isinstance(of, Figure)}


def ppl_by_cache(run: QualityRun) -> Figure | str:
    """Perplexity against the size of the cache: a line for arms that differ in that alone, and the full cache's."""
    bounded = [arm for arm in run.judged_arms if "cache" in run.arms[arm]]
    if not bounded:
        return "no arm has a bounded cache"
    drawn, sizes = figure(COLUMN, 75), sorted({run.arms[arm]["cache"] for arm in bounded})
    # Of one size or another, a line has one tone.
    styles = cache_looks({arm: {key: run.arms[arm][key] for key in run.arms[arm] if key != "cache"} for arm in bounded})
    axes, families, entries = drawn.subplots(), _by_cache(run, bounded), {}
    for place, (name, arms) in enumerate(families.items()):
        entries[name] = styles[arms[0]].lines
        # Beside each other, so that no mark hides another.
        beside = 0.5 * (place + 0.5) / len(families) - 0.25
        across = [sizes.index(run.arms[arm]["cache"]) + beside for arm in arms]
        axes.plot(across, list(map(run.perplexity, arms)), label=name, **entries[name])
    full: dict[str, Any] = {"color": "0.35", "linewidth": 0.8, "linestyle": (0, (4, 2))}
    axes.axhline(run.perplexity(), label="full cache", **full)
    axes.set(yscale="log", xlabel="cache, tokens", ylabel="PPL", xlim=(-0.5, len(sizes) - 0.5))
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.grid(axis="x", visible=False)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(5) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    legend(drawn, entries | {"full cache": full})
    return drawn


def _by_cache(run: QualityRun, bounded: list[str]) -> dict[str, list[str]]:
    """Arms that differ in the size of their cache alone, the smallest first, by what is left of the name without it."""
    families: dict[str, list[str]] = {}
    for arm in sorted(bounded, key=lambda arm: run.arms[arm]["cache"]):
        entry = {key: value for key, value in run.arms[arm].items() if key != "cache"}
        families.setdefault(json.dumps(entry, sort_keys=True), []).append(arm)
    found: dict[str, list[str]] = {}
    for arms in families.values():
        name = arms[0].removesuffix(f"-{run.arms[arms[0]]['cache']}")
        found[arms[0] if name in found else name] = arms
    return found


def divergence(run: QualityRun) -> Figure | str:
    """KL over position and over the distance since the last eviction, and top-1 agreement over position."""
    if not run.documents:
        return "no document was read"
    drawn, styles = figure(PAGE, 85), cache_looks(run.arms)
    entries = {}
    for axes, (of, along, up, across) in zip(drawn.subplots(1, len(_CURVES)), _CURVES, strict=True):
        for arm in run.judged_arms:
            if curve := run.curve(arm, of, along):
                look = _thin(styles[arm])
                axes.plot(*zip(*curve, strict=True), label=arm, **look)
                entries[arm] = look
        axes.set(xlabel=across, ylabel=up)
        if of == "kl":
            axes.set_yscale("symlog", linthresh=_SMALL)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:g}")
    legend(drawn, entries)
    return drawn


def _thin(look: Look) -> dict[str, Any]:
    """A line of many, whose points are too close for marks."""
    return {"color": look.colour, "linestyle": look.line, "linewidth": 1.0}


def needles(run: QualityRun) -> Figure | str:
    """A panel for each arm: depth down, length across; the probability of the answer, a token, and what was found."""
    seekers = list(dict.fromkeys(each.arm for each in run.needles))
    if not seekers:
        return "no needle was looked for"
    depths = sorted({each.depth for each in run.needles})
    drawn, panels = panels_of(len(seekers), 8.0 * len(depths) + 12)
    for axes, arm in zip(panels, seekers, strict=True):
        grid = run.grid(arm)
        lengths = sorted({length for length, _ in grid})
        tiles = [[math.nan] * len(lengths) for _ in depths]
        for (length, depth), cell in grid.items():
            across, down = lengths.index(length), depths.index(depth)
            likely = sum(math.exp(each.logprob / len(each.ranks)) for each in cell) / len(cell)
            tiles[down][across] = likely
            ink = "black" if likely > 0.5 else "white"
            found = f"{sum(each.exact for each in cell)}/{len(cell)}"
            axes.text(across, down, found, ha="center", va="center", color=ink, fontsize=7)
        image = axes.imshow(tiles, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.grid(visible=False)
        axes.set_title(text(arm))
    name_axes(panels, "length, tokens", "depth")
    drawn.colorbar(image, ax=panels, label="probability of the answer, a token", fraction=0.05)
    return drawn


def cost_against_speed(run: QualityRun, speed: RunFile) -> Figure | str:
    """ΔNLL against the speedup over `ar`, each with its interval, and what nothing beats in both."""
    points = [point for point in tradeoff(run, speed).points if math.isfinite(point.speedup.value)]
    if not any(point.judged for point in points):
        return "no lossy arm is in both runs"
    drawn = figure(PAGE, 85)
    axes, styles, entries = drawn.subplots(), looks(speed), {}
    for point in points:
        look = styles[point.arm]
        interval: dict[str, Any] = {"xerr": _sides(point.speedup), "yerr": _sides(point.cost)}
        interval |= {"elinewidth": 0.7, "ecolor": lighter(look.colour, 0.4)}
        axes.errorbar(point.speedup.value, point.cost.value, label=point.arm, **interval, **look.marks)
        entries[how_drawn(speed, point.arm)] = look.marks
    axes.margins(x=0.1, y=0.12)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = {point.arm: (point.speedup.value, point.cost.value) for point in points}
    best = pareto_front({arm: (faster, -cost) for arm, (faster, cost) in places.items()})
    corners = [(left, places[best[0]][1])]
    for arm in best:
        corners += [(corners[-1][0], places[arm][1]), places[arm]]
    line: dict[str, Any] = {"color": "0.6", "linewidth": 0.8}
    (around,) = axes.plot(*zip(*corners, (corners[-1][0], top), strict=True), zorder=1, **line)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="speedup over ar", ylabel="ΔNLL, nats a token: less is better")
    legend(drawn, entries | {"Pareto front": line})
    label_points(axes, {text(label(speed, arm)): places[arm] for arm in [*best[::-1], *places]}, around)
    for name in axes.texts:
        # Intervals run where names stand.
        name.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85})
    return drawn


def _sides(of: Estimate) -> list[list[float]] | None:
    """How far an interval reaches to either side; None where it has no end."""
    sides = [[of.value - of.low], [of.high - of.value]]
    return sides if math.isfinite(of.low) and math.isfinite(of.high) else None


_FIGURES: dict[str, Callable[[QualityRun], Figure | str]] = {
    "ppl-by-cache": ppl_by_cache,
    "divergence": divergence,
    "needles": needles,
}
"""The figures that a run has alone, by the names of their files."""

_CAPTIONS = {
    "ppl-by-cache": "Perplexity against the size of the cache; the dashed line is the full cache.",
    "divergence": "Divergence from the full cache over position, and since the last eviction. Light: a smaller cache;"
    " dotted: a negative control.",
    "needles": "Needles that were found, of those that were buried at a length and a depth.",
    "cost-against-speed": "What decoding costs against what it gains, with 95 % intervals.",
}
"""What each figure shows, for a page."""
