"""A print figure: the speedup against the load on a server."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from specdecode.bench.report.drawing import COLUMN, figure, legend, looks, sides
from specdecode.bench.report.load import families, gains
from specdecode.bench.runs.records import RunFile


def speedup_by_concurrency(run: RunFile) -> Figure | str:
    """Draw the speedup against concurrency, with its intervals: a line for each drafting arm."""
    curves, arms = gains(run), families(run)
    if not curves:
        return "no drafting arms of servers differ only in concurrency"
    drawn = figure(COLUMN, 65)
    axes, styles = drawn.subplots(), looks(run)
    entries: dict[str, dict[str, Any]] = {}
    axes.axhline(1, color="0.35", linewidth=0.8, zorder=0.6)
    for place, (name, by_number) in enumerate(curves.items()):
        speedups = {number: speedup for number, speedup in by_number.items() if math.isfinite(speedup.value)}
        # Shifted sideways, so that no interval hides another.
        beside = 2 ** (0.06 * (place - (len(curves) - 1) / 2))
        look = styles[next(iter(arms[name].values()))].lines | {"marker": "os^DvPX"[place % 7]}
        across, up = [number * beside for number in speedups], [speedup.value for speedup in speedups.values()]
        axes.errorbar(across, up, sides(list(speedups.values())), label=name, elinewidth=0.8, capsize=1.5, **look)
        entries[name] = look
    numbers = sorted({number for by_number in curves.values() for number in by_number})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.set(xlabel="prompts at a time", ylabel="speedup over the reference arm")
    legend(drawn, entries)
    return drawn
