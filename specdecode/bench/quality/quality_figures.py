"""Print figures of a run of the quality suite: `specdecode report RUN --figures DIR`.

Figures need only the run's file; quality against speed also needs the file of a run of `pytest --benchmark`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from specdecode.bench.quality.curves import CURVES, KL_THRESHOLD_NATS
from specdecode.bench.quality.quality_tables import title
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
    save,
    sides,
    text,
)
from specdecode.bench.report.figures import how_drawn, name_axes, panels_of
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import pareto_front, staircase
from specdecode.evals.results import QualityRun


def write(run: QualityRun, folder: Path, speed: RunFile | None = None) -> dict[str, str]:
    """Write the figures that a run has the data for, as PDF and as PNG.

    Returns:
        For each figure an empty text, or the reason why it is missing.
    """
    return save(draw(run, speed), folder, title(run))


def draw(run: QualityRun, speed: RunFile | None = None) -> dict[str, Figure | str]:
    """Return each figure by its name, or the reason why it is missing."""
    with in_print():
        drawn = {name: make(run) for name, make in _FIGURES.items()}
        why = "no run of speeds was given (--speed)"
        return drawn | {"cost-against-speed": why if speed is None else cost_against_speed(run, speed)}


def ppl_by_cache(run: QualityRun) -> Figure | str:
    """Draw perplexity against cache size: a line for arms that differ only in it, and a line for the full cache."""
    families = run.by_cache()
    if not families:
        return "no arm has a bounded cache"
    bounded = [arm for arms in families.values() for arm in arms]
    drawn, sizes = figure(COLUMN, 75), sorted({run.arms[arm]["cache"] for arm in bounded})
    # A line joins several cache sizes, so it has no tone of a size.
    styles = cache_looks({arm: {key: run.arms[arm][key] for key in run.arms[arm] if key != "cache"} for arm in bounded})
    axes, entries = drawn.subplots(), {}
    for place, (name, arms) in enumerate(families.items()):
        entries[name] = styles[arms[0]].lines
        # Shifted sideways, so that no mark hides another.
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


def divergence(run: QualityRun) -> Figure | str:
    """Draw KL over position and over the distance since the last eviction, and top-1 agreement over position."""
    if not run.documents:
        return "no document was read"
    drawn, styles = figure(PAGE, 85), cache_looks(run.arms)
    entries = {}
    for axes, curve in zip(drawn.subplots(1, len(CURVES)), CURVES, strict=True):
        for arm in run.judged_arms:
            if points := run.curve(arm, curve.measure, curve.along):
                look = _thin(styles[arm])
                axes.plot(*zip(*points, strict=True), label=arm, **look)
                entries[arm] = look
        axes.set(xlabel=curve.x_name, ylabel=curve.y_name)
        if curve.measure == "kl":
            axes.set_yscale("symlog", linthresh=KL_THRESHOLD_NATS)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:g}")
    legend(drawn, entries)
    return drawn


def _thin(look: Look) -> dict[str, Any]:
    """Return the style of a line with points too close for marks."""
    return {"color": look.colour, "linestyle": look.line, "linewidth": 1.0}


def needles(run: QualityRun) -> Figure | str:
    """Draw a panel for each arm: the probability of the answer and the found needles, by depth and length."""
    seekers = list(dict.fromkeys(trial.arm for trial in run.needles))
    if not seekers:
        return "no needle was looked for"
    depths = sorted({trial.depth for trial in run.needles})
    drawn, panels = panels_of(len(seekers), 8.0 * len(depths) + 12)
    for axes, arm in zip(panels, seekers, strict=True):
        cells = run.needle_cells(arm)
        lengths = sorted({length for length, _ in cells})
        tiles = [[math.nan] * len(lengths) for _ in depths]
        for (length, depth), cell in cells.items():
            across, down = lengths.index(length), depths.index(depth)
            tiles[down][across] = cell.token_probability
            ink = "black" if cell.token_probability > 0.5 else "white"
            axes.text(across, down, f"{cell.found}/{cell.count}", ha="center", va="center", color=ink, fontsize=7)
        image = axes.imshow(tiles, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.grid(visible=False)
        axes.set_title(text(arm))
    name_axes(panels, "length, tokens", "depth")
    drawn.colorbar(image, ax=panels, label="probability of the answer, a token", fraction=0.05)
    return drawn


def cost_against_speed(run: QualityRun, speed: RunFile) -> Figure | str:
    """Draw ΔNLL against the speedup over the run's reference arm, each with its interval, and the Pareto front."""
    points = tradeoff(run, speed).drawable
    if not points:
        return "no lossy arm is in both runs"
    drawn = figure(PAGE, 85)
    axes, styles, entries = drawn.subplots(), looks(speed), {}
    for point in points:
        look = styles[point.arm]
        interval: dict[str, Any] = {"elinewidth": 0.7, "ecolor": lighter(look.colour, 0.4)}
        for bar, estimate in (("xerr", point.speedup), ("yerr", point.cost)):
            interval[bar] = sides([estimate]) if estimate.bounded else None
        axes.errorbar(point.speedup.value, point.cost.value, label=point.arm, **interval, **look.marks)
        entries[how_drawn(speed, point.arm)] = look.marks
    axes.margins(x=0.1, y=0.12)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = {point.arm: (point.speedup.value, point.cost.value) for point in points}
    front = pareto_front({arm: (speedup, -cost) for arm, (speedup, cost) in places.items()})
    corners = staircase([places[arm] for arm in front], left, top)
    line: dict[str, Any] = {"color": "0.6", "linewidth": 0.8}
    (around,) = axes.plot(*zip(*corners, strict=True), zorder=1, **line)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel=text(f"speedup over {speed.header.baseline}"), ylabel="ΔNLL, nats a token: lower is better")
    legend(drawn, entries | {"Pareto front": line})
    label_points(axes, {text(label(speed, arm)): places[arm] for arm in [*front[::-1], *places]}, around)
    for name in axes.texts:
        # Names may lie on intervals, so they get a background.
        name.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85})
    return drawn


_FIGURES: dict[str, Callable[[QualityRun], Figure | str]] = {
    "ppl-by-cache": ppl_by_cache,
    "divergence": divergence,
    "needles": needles,
}
"""The functions for figures of the run alone, by the names of the files."""
