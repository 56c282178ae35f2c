"""Print figures of a run of speeds, from its file alone: `specdecode report RUN --figures DIR`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specdecode.bench.report.captions import drafts, label, loops, outputs, title
from specdecode.bench.report.drawing import (
    BAND,
    COLUMN,
    PAGE,
    drafts_apart,
    figure,
    in_print,
    label_ends,
    label_points,
    legend,
    lighter,
    looks,
    save,
    sides,
    text,
)
from specdecode.bench.report.latex import latex_table_1
from specdecode.bench.report.load import scales
from specdecode.bench.report.load_figure import speedup_by_concurrency
from specdecode.bench.report.palette import PLAIN, alike, method, settings, shared_name
from specdecode.bench.report.speedup_model import modelled
from specdecode.bench.runs.measures import Counters, Measures
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import Estimate, pareto_front, staircase
from specdecode.support.files import write_whole

# Keys of a preset's entry that set how the target is decoded. The other keys set how drafts are made.
_CONDITIONS = ("policy", "cache", "quantize", "backend", "batch", "replay")
_TITLE_LETTERS = 26  # longer titles of panels are broken
_LEAST_DRAFTS = 10  # the acceptance of fewer drafts is too uncertain


def write(run: RunFile, folder: Path) -> dict[str, str]:
    """Write the figures that a run has the data for, as PDF and as PNG, and `table1.tex`.

    Returns:
        For each figure an empty text, or the reason why it is missing.
    """
    missing = save(draw(run), folder, title(run))
    write_whole(folder / "table1.tex", latex_table_1(run))
    return missing


def draw(run: RunFile) -> dict[str, Figure | str]:
    """Return each figure by its name, or the reason why it is missing."""
    with in_print():
        return {name: make(run) for name, make in FIGURES.items()}


def memory_by_length(run: RunFile) -> Figure | str:
    """Draw the peak KV against the length of the output: a line for each policy, cache size and batch size.

    A band around each line spans the arms, from the least to the most KV. Drafts hardly change KV.
    """
    if len(run.lengths) < 2:
        return "the run has only one length"
    curves = _by_length(run, lambda counters: counters.peak_cache_bytes, 1e-6)
    if not curves:
        return "no KV was counted"
    drawn, ends = figure(PAGE, 65), []
    axes = drawn.subplots()
    for place, (way, arms) in enumerate(_ways(run, curves, ("policy", "cache", "batch"), "full cache").items()):
        megabytes = np.array([curves[arm] for arm in arms])
        look = _neutral(place)
        axes.plot(run.lengths, megabytes.mean(0), clip_on=False, label=way, **look)
        axes.fill_between(run.lengths, megabytes.min(0), megabytes.max(0), color=look["color"], alpha=0.25, linewidth=0)
        names = list(dict.fromkeys(method(run, arm) for arm in arms))
        also = f" and {len(names) - 2} more" if len(names) > 2 else ""
        ends.append((megabytes.mean(0)[-1], f"{way}\n({', '.join(map(text, names[:2]))}{also})", look["color"]))
    axes.set(xlim=(0, run.lengths[-1]), ylim=(0, None), xticks=run.lengths)
    axes.set(xlabel="output, tokens", ylabel="peak KV, MB")
    label_ends(axes, ends)
    return drawn


def comprehensive(run: RunFile) -> Figure | str:
    """Draw measures against the size of the cache: a column of panels for each length, a row for each measure."""
    series = [by_size for by_size in _by_cache(run) if len(by_size) > 1]
    if not series:
        return _lacking(run, "no arms differ only in their cache")
    if not any(run.header.baseline in by_size.values() for by_size in series):
        series.insert(0, {math.inf: run.header.baseline})
    sizes = sorted({size for by_size in series for size in by_size})
    measures: dict[str, tuple[float, Callable[[Measures], float | None]]] = {
        "tokens/s": (1.0, lambda arm: arm.throughput),
        "TTFT, ms": (1e3, lambda arm: arm.ttft_s),
        "TPOT, ms": (1e3, lambda arm: arm.tpot_s),
        "accepted, %": (100.0, lambda arm: arm.counters.acceptance_rate),
        "KV, MB": (1e-6, lambda arm: arm.counters.peak_cache_bytes),
    }
    drawn = figure(PAGE, 28.0 * len(measures) + 20)
    panels = drawn.subplots(len(measures), len(run.lengths), sharex=True, sharey="row", squeeze=False)
    styles, entries = drafts_apart(run, [by_size[max(by_size)] for by_size in series]), {}
    for column, length in zip(panels.T, run.lengths, strict=True):
        part = run.at(length)
        for place, by_size in enumerate(series):
            arms = [by_size[size] for size in sorted(by_size)]
            look = styles[arms[-1]]
            name = arms[-1] if math.inf in by_size else shared_name(run, arms, "cache")
            entries[f"{name} (synthetic)" if run.arms[arms[-1]].synthetic else name] = look.lines
            measured = [part.measures(arm) for arm in arms]
            # Shifted sideways, so that no interval hides another.
            across = [sizes.index(size) + 0.4 * (place + 0.5) / len(series) - 0.2 for size in sorted(by_size)]
            for axes, (unit, measure) in zip(column, measures.values(), strict=True):
                values = [math.nan if (value := measure(arm)) is None else unit * value for arm in measured]
                if not all(map(math.isnan, values)):
                    spread = [arm.throughput_std or 0.0 for arm in measured] if axes is column[0] else None
                    axes.errorbar(across, values, spread, label=name, elinewidth=0.8, **look.lines)
        column[0].set_title(f"{length:,} tokens")
        column[-1].set_xlabel("cache, tokens")
        column[-1].set_xticks(range(len(sizes)), [f"{size:g}" if size < math.inf else "all" for size in sizes])
    for axes, name in zip(panels[:, 0], measures, strict=True):
        axes.set(ylabel=name, ylim=(0, 1.06 * axes.get_ylim()[1]))
    drawn.align_ylabels()
    legend(drawn, entries)
    return drawn


def methods(run: RunFile) -> Figure | str:
    """Draw a bar for each arm: its speedup with the interval; and the A/A floor. Void times have no bar."""
    speedups = _speedups(run)
    if not speedups:
        return _no_speedups(run)
    order = sorted(speedups, key=lambda arm: speedups[arm].value)
    listed = [*order, *_void(run)]
    drawn = figure(COLUMN, 4.0 * len(listed) + 16)
    axes, styles = drawn.subplots(), looks(run)
    beside: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
    beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    _floor(run, axes.axvspan, axes.axvline)
    for place, arm in enumerate(order):
        speedup = speedups[arm]
        axes.barh(place, speedup.value, 0.68, label=arm, linewidth=0.8, **styles[arm].bars)
        axes.errorbar(speedup.value, place, xerr=sides([speedup]), color="black", elinewidth=0.8, capsize=1.5)
        axes.annotate(f"{speedup.value:.2f}", (speedup.high, place), **beside)
    axes.set_yticks(range(len(listed)), [_marked(run, arm) for arm in listed])
    axes.set(xlim=(0, 1.22 * max(speedup.high for speedup in speedups.values())), ylim=(-0.7, len(listed) - 0.3))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(text(f"speedup over {run.compared_with}"))
    return drawn


def speedup_by_k(run: RunFile) -> Figure | str:
    """Draw a panel for each family of arms that differ only in K: measured speedups, and two models."""
    families = modelled(run)
    if not families:
        return _lacking(run, "no chain arms differ only in K")
    drawn, panels = panels_of(len(families), 46.0)
    styles = looks(run)
    predicted: dict[str, dict[str, Any]] = {
        "the study's approximation": {"color": "0.55", "linestyle": (0, (1, 1.2))},
        "exact expectation": {"color": "0.2", "linestyle": (0, (5, 1.5))},
    }
    for axes, (name, rows) in zip(panels, families.items(), strict=True):
        ks, first = [row.k for row in rows], rows[0].arm
        _floor(run, axes.axhspan, axes.axhline)
        axes.plot(ks, [row.study for row in rows], label="study", **predicted["the study's approximation"])
        axes.plot(ks, [row.exact for row in rows], label="exact", **predicted["exact expectation"])
        measured = [row.measured for row in rows]
        values = [speedup.value for speedup in measured]
        axes.errorbar(ks, values, sides(measured), label="measured", elinewidth=0.8, capsize=1.5, **styles[first].marks)
        axes.set_title(text(f"{name} (synthetic)" if run.arms[first].synthetic else name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_axes(panels, "K, proposals a step", text(f"speedup over {run.compared_with}"))
    mark = {"color": "0.2", "marker": "o", "linestyle": "none"}
    legend(drawn, {"measured, 95 % interval": mark, **predicted})
    return drawn


def compressions_by_cache(run: RunFile) -> Figure | str:
    """Draw evictions against the size of the cache: a panel for each policy, a line for each length.

    A band around each line spans the arms. Evictions depend on the text, and not on drafts.
    """
    counted = _by_length(run, lambda counters: counters.compressions)
    bounded = [arm for arm in counted if isinstance(run.arms[arm].options.get("cache"), int)]
    ways = _ways(run, bounded, [key for key in _CONDITIONS if key != "cache"], "")
    sizes = sorted({run.arms[arm].options["cache"] for arm in bounded})
    if len(sizes) < 2:
        return _lacking(run, "no arms differ in the size of a bounded cache")
    drawn, panels = panels_of(len(ways), 50.0)
    entries = {}
    for axes, (way, arms) in zip(panels, ways.items(), strict=True):
        for place, length in enumerate(run.lengths):
            by_size: dict[int, list[float]] = {}
            for arm in sorted(arms, key=lambda arm: run.arms[arm].options["cache"]):
                by_size.setdefault(run.arms[arm].options["cache"], []).append(counted[arm][place])
            across, look = [sizes.index(size) for size in by_size], _neutral(len(run.lengths) - place - 1)
            axes.plot(across, list(map(fmean, by_size.values())), label=f"{length}", **look)
            least, most = list(map(min, by_size.values())), list(map(max, by_size.values()))
            axes.fill_between(across, least, most, color=look["color"], alpha=0.25, linewidth=0)
            entries[f"{length:,} tokens of output"] = look
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axes.set_title(way)
        axes.set_ylim(0)
    name_axes(panels, "cache, tokens", "evictions a run")
    legend(drawn, entries)
    return drawn


def acceptance_by_position(run: RunFile) -> Figure | str:
    """Draw the share of proposals accepted at each position: a line for each arm that drafts.

    Each combination of target settings has a panel. Positions that few drafts reached are left out.
    """
    shares = {arm: _accepted(run, arm) for arm in run.arms if drafts(run.arms[arm])}
    shares = {arm: by_position for arm, by_position in shares.items() if by_position}
    if not shares:
        return f"no arm is known to have drafted {_LEAST_DRAFTS} times"
    ways = _ways(run, shares, _CONDITIONS, "unchanged target")
    drawn, panels = panels_of(len(ways), 50.0)
    entries: dict[str, dict[str, Any]] = {}
    # The same draft has the same line in every panel, and is in the legend once.
    drafts_of = {arm: settings(run.arms[arm], *_CONDITIONS) if run.arms[arm].options else arm for arm in shares}
    first = {draft: arm for arm, draft in reversed(drafts_of.items())}
    styles = drafts_apart(run, list(first.values())[::-1])
    for axes, (way, arms) in zip(panels, ways.items(), strict=True):
        for arm in arms:
            named = first[drafts_of[arm]]
            axes.plot(range(1, len(shares[arm]) + 1), shares[arm], label=arm, **styles[named].lines)
            entries[label(run, named)] = styles[named].lines
        axes.set_title(way if len(ways) > 1 else "")
        axes.set_ylim(0, 105)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_axes(panels, "position in the draft", "accepted, %")
    legend(drawn, entries)
    return drawn


def quality_against_speed(run: RunFile) -> Figure | str:
    """Draw the share of tokens before an output first differs from the reference arm's, against speed."""
    points = {}
    for arm in _right(run):
        measures = run.measures(arm)
        if measures.agreement is not None and measures.speedup is not None:
            points[arm] = measures.speedup, 100 * measures.agreement
    if not any(run.arms[arm].lossy for arm in points):
        return f"no lossy arm was compared with {run.compared_with}'s output"
    drawn = figure(PAGE, 85)
    axes, styles, entries = drawn.subplots(), looks(run), {}
    looping = {arm for arm in points if loops(run, arm)}
    for arm, (speed, share) in points.items():
        axes.plot([speed], [share], label=arm, **styles[arm].marks | ({"fillstyle": "none"} if arm in looping else {}))
        entries[how_drawn(run, arm)] = styles[arm].marks
    front, line = pareto_front(points), dict[str, Any](color="0.6", linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_ylim(0, 112)
    left, right = axes.get_xlim()
    corners = staircase([points[arm] for arm in front], left, 0.0)
    (around,) = axes.plot(*zip(*corners, strict=True), zorder=1, **line)
    axes.set_xlim(left, right)
    axes.set_xlabel(text(f"speedup over {run.compared_with}"))
    axes.set_ylabel(f"tokens before the output differs from {text(run.compared_with)}'s, %")
    hollow = {"hollow: text loops": {"color": "0.35", "marker": "o", "fillstyle": "none", "linestyle": "none"}}
    void = {f"{outputs(run, arm)}: {label(run, arm)}": {"linestyle": "none"} for arm in _void(run)}
    legend(drawn, entries | {"Pareto front": line} | (hollow if looping else {}) | void)
    label_points(axes, {text(label(run, arm)): points[arm] for arm in [*front[::-1], *points]}, around)
    return drawn


def by_task(run: RunFile) -> Figure | str:
    """Draw a panel for each task: the speedups on its prompts, with their intervals and its own A/A floor."""
    if len(run.tasks) < 2:
        return "the run has only one task"
    arms = list(_speedups(run))[::-1]
    if not arms:
        return _no_speedups(run)
    listed = [*arms, *_void(run)]
    drawn, panels = panels_of(len(run.tasks), 3.6 * len(listed) + 10)
    styles = looks(run)
    for axes, (task, prompts) in zip(panels, run.tasks.items(), strict=True):
        part = run.with_prompts(prompts)
        speedups = _speedups(part)
        _floor(part, axes.axvspan, axes.axvline)
        for place, arm in enumerate(arms):
            if arm in speedups:
                reach = sides([speedups[arm]])
                axes.errorbar(speedups[arm].value, place, xerr=reach, label=arm, elinewidth=0.8, **styles[arm].marks)
        words = [*filter(None, [text(task)]), f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}"]
        # Titles stand side by side, so a long one would overlap the next.
        axes.set_title((", " if len(", ".join(words)) <= _TITLE_LETTERS else ",\n").join(words))
        axes.set_yticks(range(len(listed)), [_marked(run, arm) for arm in listed])
        axes.set_ylim(-0.7, len(listed) - 0.3)
    name_axes(panels, text(f"speedup over {run.compared_with}"), "")
    return drawn


FIGURES: dict[str, Callable[[RunFile], Figure | str]] = {
    "memory-by-length": memory_by_length,
    "comprehensive": comprehensive,
    "methods": methods,
    "speedup-by-k": speedup_by_k,
    "speedup-by-concurrency": speedup_by_concurrency,
    "compressions-by-cache": compressions_by_cache,
    "acceptance-by-position": acceptance_by_position,
    "quality-against-speed": quality_against_speed,
    "by-task": by_task,
}
"""The functions that draw the figures, by the names of the files."""


def _right(run: RunFile) -> list[str]:
    """Return the arms with results, all of whose outputs were right."""
    return [arm for arm, record in run.arms.items() if record.rows and not record.faulty]


def _void(run: RunFile) -> list[str]:
    """Return the arms whose times are void, which are named and not drawn."""
    return [arm for arm, record in run.arms.items() if record.faulty]


def _speedups(run: RunFile) -> dict[str, Estimate]:
    """Return the known speedups of arms with right outputs, except the run's reference arm at any concurrency."""
    arms = [arm for arm in _right(run) if arm != run.header.baseline and not scales(run, arm)]
    speedups = {arm: run.speedup(arm) for arm in arms}
    return {arm: speedup for arm, speedup in speedups.items() if math.isfinite(speedup.value)}


def _no_speedups(run: RunFile) -> str:
    return f"no arm except {run.header.baseline} has a time"


def _floor(run: RunFile, span: Callable[..., object], line: Callable[..., object]) -> None:
    """Draw the band of the A/A floor, and the line at a speedup of 1."""
    floor = run.header.floor
    span(math.exp(-floor), math.exp(floor), color=BAND, linewidth=0, zorder=0.5, label="A/A floor")
    line(1, color="0.35", linewidth=0.8, zorder=0.6)


def _accepted(run: RunFile, arm: str) -> list[float]:
    """Return the acceptance in percent, for the positions that enough drafts reached."""
    record = run.arms[arm]
    depths = record.histograms().depth
    shares = enumerate(record.acceptance_by_position(), start=1)
    return [100 * share for at, share in shares if sum(depths[at:]) >= _LEAST_DRAFTS]


def _lacking(run: RunFile, what: str) -> str:
    """Return the reason for a missing figure: `what`, or that an older file lacks the settings of its arms."""
    known = any(record.options for record in run.arms.values())
    return what if known else "the file is of an older version, without the settings of its arms"


def _by_length(run: RunFile, counter: Callable[[Counters], float | None], unit: float = 1.0) -> dict[str, list[float]]:
    """Return a counter at each length, for the arms that have it at all lengths."""
    parts = [run.at(length) for length in run.lengths]
    curves = {arm: [counter(part.arms[arm].counters()) for part in parts] for arm in _right(run)}
    known = {arm: [unit * value for value in curve if value is not None] for arm, curve in curves.items()}
    return {arm: curve for arm, curve in known.items() if len(curve) == len(parts)}


def _by_cache(run: RunFile) -> list[dict[float, str]]:
    """Group the arms that differ only in the size of a bounded cache. A group maps sizes to arms; inf: full cache."""
    bounded = [arm for arm in _right(run) if isinstance(run.arms[arm].options.get("cache"), int)]
    whole = {settings(run.arms[arm]): arm for arm in reversed(_right(run)) if "policy" not in run.arms[arm].options}
    groups = []
    for arms in alike(run, bounded, "cache"):
        by_size: dict[float, str] = {run.arms[arm].options["cache"]: arm for arm in arms}
        if (rest := settings(run.arms[arms[0]], "policy", "cache")) in whole:
            by_size[math.inf] = whole[rest]
        groups.append(by_size)
    return groups


def panels_of(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Create panels with shared scales in rows of two or three, with room for a legend.

    Args:
        count: number of panels.
        height: height of a panel, in millimetres.
    """
    across = 2 if count in (2, 4) else min(count, 3)
    down = math.ceil(count / across)
    drawn = figure(COLUMN if count == 1 else PAGE, height * down + 14)
    panels = list(drawn.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return drawn, panels[:count]


def name_axes(panels: Sequence[Axes], across: str, up: str) -> None:
    """Name the axes of the panels with no panel below them or to their left."""
    for place, axes in enumerate(panels):
        spec = axes.get_subplotspec()
        assert spec is not None
        if place + spec.get_gridspec().ncols >= len(panels):
            axes.set_xlabel(across)
            axes.tick_params(labelbottom=True)
        if spec.is_first_col():
            axes.set_ylabel(up)


def _neutral(place: int) -> dict[str, Any]:
    """Return the style of a line that belongs to no method. Lines of earlier places are darker."""
    return {"color": lighter(PLAIN, min(0.18 * place, 0.6)), "marker": "os^DvPX"[place % 7]}


def _ways(run: RunFile, arms: Iterable[str], keys: Sequence[str], none: str) -> dict[str, list[str]]:
    """Group arms by some settings of their target, in words. Arms without these settings are in the group `none`."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        options = run.arms[arm].options
        named = ("policy", "quantize", "backend")
        words = [f"{options[key]}" if key in named else f"{key} {options[key]}" for key in keys if key in options]
        groups.setdefault(text(", ".join(words)) or none, []).append(arm)
    return groups


def _marked(run: RunFile, arm: str) -> str:
    """Return the name of an arm, with marks if it is synthetic, lossy or looping, or if its times are void."""
    record = run.arms[arm]
    void = [outputs(run, arm)] * record.faulty
    return ", ".join([text(label(run, arm)), *["lossy"] * record.lossy, *["loops"] * loops(run, arm), *void])


def how_drawn(run: RunFile, arm: str) -> str:
    """Return the traits that decide an arm's look: method, transformers or not, controller, policy and INT8."""
    record = run.arms[arm]
    changes = [str(record.options[key]) for key in ("controller", "policy", "quantize") if key in record.options]
    return ", ".join([method(run, arm), *["transformers"] * record.peer, *changes])
