"""The content of a figure for print, read back from the figure."""

from __future__ import annotations

from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from specdecode.bench.report.drawing import in_print
from specdecode.bench.report.figures import FIGURES
from specdecode.bench.runs.records import RunFile


def figure_of(run: RunFile, name: str) -> Figure:
    """Draw one figure of a run, as `figures.draw` draws all."""
    with in_print():
        drawn = FIGURES[name](run)
    assert isinstance(drawn, Figure), drawn
    return drawn


def series(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Return the drawn points under each label: those of lines and of intervals."""
    found = {str(line.get_label()): line for line in axes.lines}
    found |= {str(container.get_label()): container[0] for container in axes.containers if container[0] in axes.lines}
    return {
        label: [(float(x), float(y)) for x, y in line.get_xydata()]
        for label, line in found.items()
        if not label.startswith("_")
    }


def texts(figure: Figure) -> list[Text]:
    """Return all visible texts. Tick labels outside an axis's range are left out."""
    unseen = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    return [text for text in found if text.get_text() and text not in unseen]


def unreadable(figure: Figure) -> list[str]:
    """Return the texts that overlap another or are cut at the edge."""
    with in_print():
        figure.draw_without_rendering()
        # Text boxes alone, without the lines that lead to names.
        boxes = {text: Text.get_window_extent(text) for text in texts(figure)}
    page = figure.bbox.padded(1)
    over = [
        f"{one.get_text()!r} and {other.get_text()!r}"
        for (one, box), (other, its) in combinations(boxes.items(), 2)
        if box.padded(-1).overlaps(its.padded(-1))
    ]
    inside = {text: page.fully_containsx(box.x0) and page.fully_containsx(box.x1) for text, box in boxes.items()}
    return over + [f"{text.get_text()!r} is cut" for text in boxes if not inside[text]]
