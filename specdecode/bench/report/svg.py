"""SVG charts inside HTML pages: scales, axes, lines and marks in the colours of `page.css`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specdecode.bench.report.elements import Element, element


class Style(NamedTuple):
    """The look of a series in every chart.

    Attributes:
        colour: a class of `page.css`: "c0" and so on, or "plain".
        hollow: whether marks are unfilled.
        square: whether marks are squares instead of dots.
        dash: dash pattern of lines, in SVG's notation; empty for a solid line.
        opacity: opacity of lines and marks, from 0 to 1.
    """

    colour: str
    hollow: bool = False
    square: bool = False
    dash: str = ""
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Scale:
    """A map from values to places in a drawing.

    Attributes:
        transform: increasing function that is applied first, such as a logarithm.
        low, high: transformed values at the ends.
        start, end: places of the ends.
        ticks: round values between the ends.
    """

    transform: Callable[[float], float]
    low: float
    high: float
    start: float
    end: float
    ticks: list[float]

    def __call__(self, value: float) -> float:
        share = (self.transform(value) - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share


def linear_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return a linear scale from `low` to `high`."""
    return Scale(float, low, high, start, end, _multiples(low, high))


def log_scale(ratios: Iterable[float], start: float, end: float, least: float) -> Scale:
    """Return a logarithmic scale that includes all finite ratios.

    Args:
        ratios: values above 0.
        start, end: places of its ends.
        least: smallest span of the scale, as a natural logarithm.
    """
    logs = [math.log(ratio) for ratio in ratios if math.isfinite(ratio)]
    middle = (max(logs) + min(logs)) / 2
    half = max(max(logs) - min(logs), least) / 2 * 1.08
    low, high = math.exp(middle - half), math.exp(middle + half)
    if high / low < 4:
        ticks = _multiples(low, high)
    else:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
    return Scale(math.log, middle - half, middle + half, start, end, ticks)


def log_scale_with_zero(high: float, start: float, end: float, threshold: float) -> Scale:
    """Return a scale from 0 to `high` that is linear below a threshold and logarithmic above it (an inverse sinh).

    Args:
        high: largest value, above the threshold.
        start, end: places of its ends.
        threshold: a value above 0.
    """

    def transform(value: float) -> float:
        return math.asinh(value / threshold)

    powers = range(math.floor(math.log10(threshold)), math.floor(math.log10(high)) + 1)
    ticks = [0.0, *(10.0**power for power in powers if threshold <= 10.0**power <= high)]
    return Scale(transform, 0.0, transform(high), start, end, ticks)


def _multiples(low: float, high: float) -> list[float]:
    """Return the multiples of a round step between two ends, six at most."""
    steps = (digit * 10.0**power for power in range(-6, 300) for digit in (1, 2, 5))
    step = next(step for step in steps if high / step - low / step < 5.5)
    return [float(f"{step * i:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def drawing(
    width: float, height: float, name: str, description: str, *parts: Element, colour: str = "plain"
) -> Element:
    """Return an SVG element with its content in words, for screen readers.

    Args:
        width, height: size in pixels, unscaled.
        name: name of the chart.
        description: the drawn values, in words.
        parts: elements of the drawing.
        colour: class of `page.css` for marks and lines outside of groups.
    """
    return element(
        "svg",
        element("title", name),
        element("desc", description),
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        class_=colour,
        aria_label=f"{name}: {description}",
    )


def axes(x: Scale, y: Scale, x_ticks: Iterable[tuple[float, str]], x_name: str, y_format: str = "g") -> list[Element]:
    """Draw the lines and names of the ticks of both axes.

    Args:
        x, y: the scales; the lower end of y is its `start`.
        x_ticks: places and names of the ticks of x.
        x_name: name of the x axis.
        y_format: format of the values at the ticks of y.
    """
    parts = [line(x.start, y(tick), x.end, y(tick), "axis") for tick in y.ticks]
    parts += [text(x.start - 6, y(tick) + 4, format(tick, y_format), text_anchor="end") for tick in y.ticks]
    parts += [text(place, y.start + 14, name, text_anchor="middle") for place, name in x_ticks]
    return [*parts, text((x.start + x.end) / 2, y.start + 29, x_name, text_anchor="middle")]


def series(style: Style, *parts: Element) -> Element:
    """Group the elements of one series, in its colour."""
    return element("g", *parts, class_=style.colour, opacity=f"{style.opacity:g}")


def text(x: float, y: float, content: str, **attributes: object) -> Element:
    """Write a text at a place."""
    return element("text", content, x=rounded(x), y=rounded(y), **attributes)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    """Draw a straight line of a class of `page.css`."""
    return element("line", x1=rounded(x1), y1=rounded(y1), x2=rounded(x2), y2=rounded(y2), class_=kind)


def rectangle(x: float, y: float, width: float, height: float, kind: str, **attributes: object) -> Element:
    """Draw a rectangle of a class of `page.css`."""
    size = {"width": rounded(width), "height": rounded(height)}
    return element("rect", x=rounded(x), y=rounded(y), **size, class_=kind, **attributes)


def mark(x: float, y: float, style: Style, radius: float = 3.5) -> Element:
    """Draw the mark of a series at a place."""
    kind = "hollow" if style.hollow else "mark"
    if style.square:
        return rectangle(x - radius, y - radius, 2 * radius, 2 * radius, kind)
    return element("circle", cx=rounded(x), cy=rounded(y), r=radius, class_=kind)


def path(points: Sequence[tuple[float, float]], kind: str = "rule", dash: str = "") -> Element:
    """Draw a line through several places."""
    dashes = {"stroke_dasharray": dash} if dash else {}
    return element("polyline", points=" ".join(f"{rounded(x)},{rounded(y)}" for x, y in points), class_=kind, **dashes)


def names(points: Mapping[str, tuple[float, float]], left: float, right: float) -> list[Element]:
    """Write names beside points, the first names first. A name without free space is left out.

    Args:
        points: places of the points, by name.
        left, right: limits of the space for names.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points.values()]
    written = []
    for name, (x, y) in points.items():
        for across, up, anchor in _BESIDE:
            width = letters(len(name))
            start = x + across - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (start, y - up - _LETTER_HEIGHT, start + width, y - up + 2)
            overlaps = any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            )
            if left <= box[0] and box[2] <= right and not overlaps:
                taken.append(box)
                written.append(text(x + across, y - up, name, text_anchor=anchor, class_="name"))
                break
    return written


# Offsets of a name from its point: to the right and up, in pixels, and the part of the name that is placed there.
_BESIDE = (
    *((7.0, 6.0, "start"), (8.0, -4.0, "start"), (0.0, 9.0, "middle"), (-8.0, -4.0, "end")),
    *((0.0, -17.0, "middle"), (-7.0, 6.0, "end"), (7.0, -15.0, "start"), (-7.0, -15.0, "end")),
)
_LETTER_WIDTH, _LETTER_HEIGHT = 6.2, 10.0


def letters(count: int) -> float:
    """Return the width of so many letters of a chart, in pixels."""
    return _LETTER_WIDTH * count


def swatch(style: Style) -> Element:
    """Return the mark of a series, to be placed beside its name."""
    background = "transparent" if style.hollow else "currentColor"
    return element("span", class_=f"swatch {style.colour}", style=f"background: {background}")


def legend(entries: Mapping[str, Style]) -> Element:
    """Return a legend: a list of lines with marks, each with its name."""
    items = []
    for name, style in entries.items():
        key = [path([(0, 6), (28, 6)], dash=style.dash), mark(14, 6, style, 3)]
        sample = element("svg", series(style, *key), viewBox="0 0 28 12", aria_hidden="true")
        items.append(element("li", sample, name))
    return element("ul", *items, class_="legend")


def card(heading: Sequence[Element | str], chart: Element, more: str = "") -> Element:
    """Return a card with a heading, a chart, and a sentence between them."""
    between = [element("p", more)] if more else []
    return element("figure", element("h3", *heading), *between, chart, class_="card")


def rounded(place: float) -> str:
    """Return a place in pixels as text, with one decimal."""
    return f"{place:.1f}"
