"""Set how figures look in print: sizes, letters, colours and marks, and files that come out the same again."""

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
"""Widths of a figure, in millimetres: of one column of a page with two, and of the page."""

BAND = "#e4e6e9"
"""The colour of the A/A floor."""

_FONT_POINTS = 8.0
_LINE_POINTS = 9.5  # from one line of text to the next
_LETTER_POINTS = 4.0  # width of a letter of a legend
_NAME_LETTERS = 36  # of a name, at most
_SETTINGS: dict[Any, Any] = {
    "font.size": _FONT_POINTS,
    "font.family": "DejaVu Sans",  # the one that comes with matplotlib, so that the same text is as wide everywhere
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
    # Names come from the file: a dollar in them is a dollar.
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
    """Set matplotlib up as figures here need it, whatever the user has set, and restore it afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font does not have is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


@dataclass(frozen=True, slots=True)
class Look:
    """How an arm is drawn.

    The colour and the mark tell how it drafts, the fill of the mark by which controller. The line and the tone tell
    what is done to the target. Arms of transformers have marks of strokes, and hatches.

    Attributes:
        hue: the method's own colour, hexadecimal.
        colour: its tone for this arm.
        mark, fill, line: in matplotlib's words.
        hatch: of a bar, which then is not filled.
    """

    hue: str
    colour: str
    mark: str
    fill: str
    line: str
    hatch: str

    @property
    def marks(self) -> dict[str, Any]:
        """Arguments of a plot without a line."""
        lines = {"color": self.colour, "markeredgecolor": self.colour, "markerfacecoloralt": "white"}
        return {"marker": self.mark, "fillstyle": self.fill, "linestyle": "none", **lines}

    @property
    def lines(self) -> dict[str, Any]:
        """Arguments of a plot with one."""
        return self.marks | {"linestyle": self.line}

    @property
    def bars(self) -> dict[str, Any]:
        """Arguments of a plot of bars."""
        return {"edgecolor": self.colour, "facecolor": "white" if self.hatch else self.colour, "hatch": self.hatch}


def looks(run: RunFile) -> dict[str, Look]:
    """Return how each arm is drawn, the same in all figures and for all runs that tell the settings of their arms."""
    colours = {arm: PLAIN if place is None else COLOURS[place] for arm, place in places(run).items()}
    return {arm: _look(method(run, arm), run.arms[arm], colours[arm]) for arm in run.arms}


def drafts_apart(run: RunFile, arms: Sequence[str]) -> dict[str, Look]:
    """Return how arms are drawn that stand together, whatever is done to their target.

    They are lighter for shorter drafts where some differ in K alone, and have other lines where they still look alike.
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
    """Return how the arms of the quality suite are drawn, by their entries.

    The colour and the mark tell the cache policy, a lighter tone the smaller cache, a darker one INT8. Dotted lines and
    hollow marks are negative controls.
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
    """Make an empty figure of a size in millimetres."""
    return Figure((width / 25.4, height / 25.4), layout="constrained")


def sides(ratios: Sequence[Estimate]) -> list[list[float]]:
    """Return how far intervals reach to either side, as matplotlib wants it."""
    return [[ratio.value - ratio.low for ratio in ratios], [ratio.high - ratio.value for ratio in ratios]]


def text(name: str) -> str:
    """Write a name in one line, cut off where there is no room for it."""
    line = " ".join(name.split())
    return line if len(line) <= _NAME_LETTERS else f"{line[: _NAME_LETTERS - 1]}…"


def legend(drawn: Figure, entries: dict[str, dict[str, Any]]) -> None:
    """Write what marks and lines mean, below all axes, in as many columns as there is room for.

    Args:
        drawn: the figure.
        entries: arguments of a plot by what they stand for.
    """
    names = list(map(text, entries))
    handles = [Line2D([], [], label=name, **look) for name, look in zip(names, entries.values(), strict=True)]
    columns = int(drawn.get_figwidth() * 72 / (_LETTER_POINTS * max(map(len, names)) + 32))
    drawn.legend(
        handles=handles, loc="outside lower center", ncols=max(1, min(columns, len(handles))), handlelength=2.4
    )


def label_ends(axes: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """Write names right of where lines end, moved apart where they would overlap.

    Args:
        axes: with all that is to be drawn in them, and limits that stay.
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
    """Return places between 0 and 1 that rise as the wanted ones, each with room to both sides.

    If there is not enough room, they go down from 1.
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

    # In both of these there is room, so there is in their mean; and it is as far above what is wanted as below it.
    means = [(high + low) / 2 for high, low in zip(up(wanted, -math.inf), down(wanted, math.inf), strict=True)]
    return down(up(means, 0.0), 1.0)


def _laid_out(axes: Axes) -> float:
    """Lay the figure out, so that the place of everything is known, and return the pixels of a point."""
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    drawn.draw_without_rendering()
    return drawn.dpi / 72


def label_points(axes: Axes, points: dict[str, tuple[float, float]], around: Line2D) -> None:
    """Write names beside points, the first ones first; a name that finds no room is left out.

    Args:
        axes: with all that is to be drawn in them.
        points: by their names.
        around: a line of upright and level parts that no name may stand on.
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


# Where a name may stand: how far, in points, to the right of its own and above it. Right above a front there is room.
_BESIDE = [(2, 4), (5, 0), (0, 4), (-5, 0), (0, -4), (-2, 4), (2, -4), (-2, -4)]


def rendered(drawn: Figure, form: str, title: str) -> bytes:
    """Return the file of a figure. It holds no date, and nothing else that is not in the run.

    Args:
        drawn: the figure, made `in_print`.
        form: of the file: "pdf" or "png".
        title: among its properties.
    """
    properties = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}
    buffer = io.BytesIO()
    with in_print():
        drawn.savefig(buffer, format=form, metadata={"Title": title, **properties[form]})
    return buffer.getvalue()


def save(figures: Mapping[str, Figure | str], folder: Path, title: str) -> dict[str, str]:
    """Write figures as PDF and as PNG.

    Args:
        figures: by the names of their files; in a few words why there is none.
        folder: that they are written into.
        title: among their properties.

    Returns:
        For each figure an empty text, or why there is none.
    """
    for name, drawn in figures.items():
        if isinstance(drawn, Figure):
            for form in ("pdf", "png"):
                write_whole(folder / f"{name}.{form}", rendered(drawn, form, title))
    return {name: drawn if isinstance(drawn, str) else "" for name, drawn in figures.items()}
