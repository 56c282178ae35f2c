"""The look of print figures: sizes, letters, colours and marks. The same run always gives the same files."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from specdecode.bench.report.palette import COLOURS, PLAIN, alike, cache_traits, method, places
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile
from specdecode.bench.runs.statistics import Estimate
from specdecode.support.files import write_whole

COLUMN, PAGE = 85.0, 175.0
"""Widths of figures, in millimetres: one column of a two-column page, and the whole page."""

BAND = "#e4e6e9"
"""The colour of the A/A floor."""

_FONT_POINTS = 8.0
_LINE_POINTS = 9.5  # distance between lines of text
_LETTER_POINTS = 4.0  # width of a letter in a legend
_NAME_LETTERS = 36  # longer names are cut off
_SETTINGS: dict[Any, Any] = {
    "font.size": _FONT_POINTS,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so text has the same width on all machines
    "axes.titlesize": _FONT_POINTS,
    "axes.labelsize": _FONT_POINTS,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    # Names come from run files: a dollar sign in a name does not start a formula.
    "text.parse_math": False,
}

_MARKS = {
    BASELINE: "d",
    "linear": "o",
    "tree-static": "s",
    "tree-best-first": "D",
    "self-streaming": "P",
    "lookup": "^",
    "universal": "X",
    "head": "v",
}
_PEER_MARKS = {BASELINE: "+", "linear": "x", "lookup": "1"}

_POLICY_MARKS = {"sink-window": "o", "key-norm": "s", "heavy-hitter": "^", "random": "x", "shuffled": "+"}


@contextmanager
def in_print() -> Iterator[None]:
    """Apply the settings of these figures to matplotlib, whatever the user has set, and restore them afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A character missing from the font is drawn as a box, which needs no warning.
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


@dataclass(frozen=True, slots=True)
class Look:
    """The look of an arm in figures.

    The colour and the mark show the drafting method, the fill of the mark shows the controller. The line and the tone
    show a bounded cache or INT8 weights. Arms of transformers have marks of strokes, and hatched bars.

    Attributes:
        hue: colour of the method, hexadecimal.
        colour: tone of that colour for this arm, hexadecimal.
        mark, fill, line: marker, fill style and line style, in matplotlib's notation.
        hatch: hatch of bars, which then are not filled; empty for filled bars.
    """

    hue: str
    colour: str
    mark: str
    fill: str
    line: str
    hatch: str

    @property
    def marks(self) -> dict[str, Any]:
        """Plot arguments for marks without a line."""
        lines = {"color": self.colour, "markeredgecolor": self.colour, "markerfacecoloralt": "white"}
        return {"marker": self.mark, "fillstyle": self.fill, "linestyle": "none", **lines}

    @property
    def lines(self) -> dict[str, Any]:
        """Plot arguments for marks with a line."""
        return self.marks | {"linestyle": self.line}

    @property
    def bars(self) -> dict[str, Any]:
        """Plot arguments for bars."""
        return {"edgecolor": self.colour, "facecolor": "white" if self.hatch else self.colour, "hatch": self.hatch}


def looks(run: RunFile) -> dict[str, Look]:
    """Return the look of each arm. It is the same in all figures, and for all runs with the settings of their arms."""
    colours = {arm: PLAIN if place is None else COLOURS[place] for arm, place in places(run).items()}
    return {arm: _look(method(run, arm), run.arms[arm], colours[arm]) for arm in run.arms}


def drafts_apart(run: RunFile, arms: Sequence[str]) -> dict[str, Look]:
    """Return looks that differ between the arms of one panel, whatever the cache and weights of their target.

    Arms that differ only in K are lighter for shorter drafts. Arms that still look alike get other lines.
    """
    apart: dict[str, Look] = {}
    for family in alike(run, arms, "k"):
        ks = [run.arms[arm].options.get("k") for arm in family]
        steps = sorted({k for k in ks if isinstance(k, int)}, reverse=True)
        for arm, k in zip(family, ks, strict=True):
            tone = 0.55 * steps.index(k) / (len(steps) - 1) if len(steps) > 1 and k in steps else 0.0
            look = looks(run)[arm]
            free = (
                replace(look, colour=lighter(look.hue, tone), line=line)
                for tone, line in product((tone, 0.5), ("-", "--", ":", "-."))
            )
            apart[arm] = next((other for other in free if other not in apart.values()), look)
    return apart


def cache_looks(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Look]:
    """Return the looks of the quality suite's arms, from their preset entries.

    The colour and the mark show the cache policy. A lighter tone is a smaller cache, a darker tone INT8. Dotted lines
    and hollow marks are negative controls.
    """
    drawn = {}
    for arm, traits in cache_traits(arms).items():
        hue = PLAIN if traits.place is None else COLOURS[traits.place]
        colour = lighter(hue, traits.fade)
        if traits.quantized:
            colour = _mixed(colour, 0.45, 0.0)
        line = ":" if traits.control else "-." if traits.quantized else "-" if traits.policy else "--"
        mark = "D" if traits.policy is None else _POLICY_MARKS.get(traits.policy, "h")
        drawn[arm] = Look(hue, colour, mark, "none" if traits.control else "full", line, "")
    return drawn


def _look(how: str, record: ArmRecord, hue: str) -> Look:
    options, colour = record.options, hue
    bounded, quantized = "policy" in options, "quantize" in options
    if bounded:
        colour = lighter(colour, 0.35)
    if quantized:
        colour = _mixed(colour, 0.4, 0.0)
    line = {(False, False): "-", (True, False): "--", (False, True): ":", (True, True): "-."}[bounded, quantized]
    fill = {"adaptive": "bottom", "cost-aware": "left"}.get(str(options.get("controller")), "full")
    if record.peer:
        return Look(hue, colour, _PEER_MARKS.get(how, "2"), "full", line, "////")
    return Look(hue, colour, _MARKS.get(how, "h"), fill, line, "")


def lighter(colour: str, share: float) -> str:
    """Mix a colour with a share of white."""
    return _mixed(colour, share, 1.0)


def _mixed(colour: str, share: float, grey: float) -> str:
    red, green, blue = (part + share * (grey - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


def figure(width: float, height: float) -> Figure:
    """Create an empty figure, with its size in millimetres."""
    return Figure((width / 25.4, height / 25.4), layout="constrained")


def sides(ratios: Sequence[Estimate]) -> list[list[float]]:
    """Return the distances from values to both ends of their intervals, as matplotlib's error bars need them."""
    return [[ratio.value - ratio.low for ratio in ratios], [ratio.high - ratio.value for ratio in ratios]]


def text(name: str) -> str:
    """Return a name in one line, cut off if it is too long."""
    line = " ".join(name.split())
    return line if len(line) <= _NAME_LETTERS else f"{line[: _NAME_LETTERS - 1]}…"


def legend(drawn: Figure, entries: dict[str, dict[str, Any]]) -> None:
    """Draw the legend of marks and lines below all axes, in as many columns as fit.

    Args:
        drawn: the figure.
        entries: plot arguments, by their name in the legend.
    """
    names = list(map(text, entries))
    handles = [Line2D([], [], label=name, **look) for name, look in zip(names, entries.values(), strict=True)]
    columns = int(drawn.get_figwidth() * 72 / (_LETTER_POINTS * max(map(len, names)) + 32))
    drawn.legend(
        handles=handles, loc="outside lower center", ncols=max(1, min(columns, len(handles))), handlelength=2.4
    )


def label_ends(axes: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """Write names to the right of the ends of lines, moved apart where they would overlap.

    Args:
        axes: axes with all their content and final limits.
        ends: the last value, the name and the colour of each line.
    """
    line = _LINE_POINTS * _laid_out(axes) / axes.bbox.height
    low, high = axes.get_ylim()
    sorted_ends = sorted(ends)
    wanted = [(value - low) / (high - low) for value, _, _ in sorted_ends]
    places = _apart(wanted, [line * (name.count("\n") + 1) / 2 for _, name, _ in sorted_ends])
    for want, place, (_, name, colour) in zip(wanted, places, sorted_ends, strict=True):
        axes.annotate(
            name,
            (1, want),
            (1.06, place),
            "axes fraction",
            va="center",
            fontsize=7,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _apart(wanted: Sequence[float], halves: Sequence[float]) -> list[float]:
    """Return places from 0 to 1 in the order of the wanted ones, each with its half height free on both sides.

    Without enough room, the places fill the axis from 1 downwards, and continue below 0.
    """

    def up(places: Sequence[float], least: float) -> list[float]:
        moved: list[float] = []
        for i, place in enumerate(places):
            moved.append(max(place, moved[-1] + halves[i - 1] + halves[i] if moved else least))
        return moved

    def down(places: Sequence[float], most: float) -> list[float]:
        moved: list[float] = []
        for i, place in reversed(list(enumerate(places))):
            moved.append(min(place, moved[-1] - halves[i] - halves[i + 1] if moved else most))
        return moved[::-1]

    # Both lists have enough room, so their mean has too. It is as far above the wanted places as below them.
    means = [(high + low) / 2 for high, low in zip(up(wanted, -math.inf), down(wanted, math.inf), strict=True)]
    return down(up(means, 0.0), 1.0)


def _laid_out(axes: Axes) -> float:
    """Lay out the figure, which fixes the place of each part, and return the pixels of a typographic point."""
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    drawn.draw_without_rendering()
    return drawn.dpi / 72


def label_points(axes: Axes, points: dict[str, tuple[float, float]], around: Line2D) -> None:
    """Write names beside points, the first names first. A name without free space is left out.

    Args:
        axes: axes with all their content.
        points: coordinates of the points, by name.
        around: line of vertical and horizontal parts that names must not cover.
    """
    size = _laid_out(axes)
    marks = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(x, y, x, y).padded(3 * size) for x, y in marks]
    corners = axes.transData.transform(around.get_xydata())
    taken += [Bbox.from_extents(*start, *end).padded(size) for start, end in pairwise(corners)]
    for name, at in points.items():
        for across, up in _BESIDE:
            beside = {-1: "right", 0: "center", 1: "left"}[(across > 0) - (across < 0)]
            above = {-1: "top", 0: "center", 1: "bottom"}[(up > 0) - (up < 0)]
            place: dict[str, Any] = {"xytext": (across, up), "textcoords": "offset points", "ha": beside, "va": above}
            written = axes.annotate(name, at, fontsize=6.5, in_layout=False, **place)
            box = written.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            written.remove()


# Offsets of a name from its point: to the right and up, in typographic points. The space right above a front is free.
_BESIDE = [(2, 4), (5, 0), (0, 4), (-5, 0), (0, -4), (-2, 4), (2, -4), (-2, -4)]


def figure_bytes(drawn: Figure, form: str, title: str) -> bytes:
    """Return the bytes of a figure's file. They depend on the run alone, and hold no date.

    Args:
        drawn: the figure, drawn within `in_print`.
        form: format of the file: "pdf" or "png".
        title: title in the properties of the file.
    """
    properties = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}
    buffer = io.BytesIO()
    with in_print():
        drawn.savefig(buffer, format=form, metadata={"Title": title, **properties[form]})
    return buffer.getvalue()


def save(figures: Mapping[str, Figure | str], folder: Path, title: str) -> dict[str, str]:
    """Write figures as PDF and as PNG.

    Args:
        figures: figures by the names of their files; for a missing figure, a short reason.
        folder: folder of the files.
        title: title in the properties of the files.

    Returns:
        For each figure an empty text, or the reason why it is missing.
    """
    for name, drawn in figures.items():
        if isinstance(drawn, Figure):
            for form in ("pdf", "png"):
                write_whole(folder / f"{name}.{form}", figure_bytes(drawn, form, title))
    return {name: drawn if isinstance(drawn, str) else "" for name, drawn in figures.items()}
