"""Charts of a run of speeds for its HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from specdecode.bench.gate.blame import Blame
from specdecode.bench.report.elements import Element
from specdecode.bench.report.palette import places
from specdecode.bench.report.svg import (
    Scale,
    Style,
    axes,
    drawing,
    letters,
    line,
    linear_scale,
    log_scale,
    mark,
    path,
    rectangle,
    series,
    text,
)
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import Estimate

INTERVAL_WIDTH, INTERVAL_HEIGHT = 208, 36
"""Size of the chart of one speedup, in pixels."""


def styles(run: RunFile) -> dict[str, Style]:
    """Return the style of each arm: the colour of its method, and hollow marks for arms of transformers."""
    classes = {arm: "plain" if place is None else f"c{place}" for arm, place in places(run).items()}
    return {arm: Style(classes[arm], hollow=record.peer) for arm, record in run.arms.items()}


def blame_bars(arm: str, blame: Blame, widest: float) -> Element:
    """Draw a bar for each cause of a change. Bars to the right are causes that made the arm slower.

    Args:
        arm: name of the arm.
        blame: the causes and their shares of the change.
        widest: change with the longest possible bar, as a natural logarithm.
    """
    width, height, middle, reach = 300, 17, 178, 62
    parts: list[Element] = []
    for i, (cause, share) in enumerate(blame.shares.items()):
        top, length = height * i, reach * abs(share) / widest
        left = middle - (length if share < 0 else 0)
        bold = {"class_": "value"} if cause == blame.main else {}
        parts += [
            text(0, top + 12, cause, **bold),
            rectangle(left, top + 3, max(length, 0.5), height - 6, f"mark {'slower' if share > 0 else 'faster'}"),
            text(width, top + 12, f"{math.expm1(share):+.1%}", text_anchor="end", **bold),
        ]
    bottom = height * len(blame.shares)
    parts.append(line(middle, 0, middle, bottom, "one"))
    chart = drawing(width, bottom, f"Change of the time per token of {arm}, by cause", str(blame), *parts)
    chart.set("style", "width: 18.75rem; max-width: 100%")
    return chart


def speedup_scale(run: RunFile, speedups: Mapping[str, Estimate], predicted: Mapping[str, float]) -> Scale:
    """Return one scale for all speedups of a run, their intervals and predictions, and the A/A floor."""
    ends = [end for speedup in speedups.values() for end in (speedup.low, speedup.high)]
    floor = run.header.floor
    ratios = [*ends, *predicted.values(), math.exp(floor), math.exp(-floor)]
    return log_scale(ratios, 14, INTERVAL_WIDTH - 14, least=math.log(1.5))


def ruler(scale: Scale) -> Element:
    """Draw the ticks of a scale of speedups."""
    ticks = [text(scale(tick), 14, f"{tick:g}", text_anchor="middle") for tick in scale.ticks]
    return drawing(INTERVAL_WIDTH, 20, "Scale of the speedups", "logarithmic", *ticks)


def interval(name: str, speedup: Estimate, predicted: float, floor: float, scale: Scale, style: Style) -> Element:
    """Draw a speedup with its interval, the prediction, and the A/A floor.

    Args:
        name: names of the arm and its reference arm.
        speedup: speedup over the reference arm; nan without a correct output.
        predicted: predicted speedup, without overhead; nan if unknown.
        floor: the A/A floor, as a ratio.
        scale: scale of the speedups.
        style: style of the arm.
    """
    height, left, right = INTERVAL_HEIGHT, scale(1 / floor), scale(floor)
    parts = [rectangle(left, 0, right - left, height, "band")]
    parts += [line(scale(tick), 0, scale(tick), height, "axis") for tick in scale.ticks if tick != 1]
    parts.append(line(scale(1.0), 0, scale(1.0), height, "one"))
    description = "no speedup: no output was correct"
    if math.isfinite(predicted):
        parts.append(line(scale(predicted), 9, scale(predicted), height - 9, "promise"))
    if math.isfinite(speedup.value):
        description = f"{speedup.value:.2f}, 95 % interval from {speedup.low:.2f} to {speedup.high:.2f}"
        low, value, high = (scale(ratio) for ratio in (speedup.low, speedup.value, speedup.high))
        parts += [line(x, height / 2 - 4, x, height / 2 + 4, "whisker") for x in (low, high)]
        parts += [line(low, height / 2, high, height / 2, "whisker"), mark(value, height / 2, style)]
    if math.isfinite(predicted):
        description += f"; predicted {predicted:.2f}"
    return drawing(INTERVAL_WIDTH, height, f"Speedup of {name}", description, *parts, colour=style.colour)


def acceptance(run: RunFile, arm: str, longest: int, style: Style) -> Element:
    """Draw the share of steps by number of accepted proposals, and the share of proposals accepted by position.

    Args:
        run: run of the arm.
        arm: name of the arm.
        longest: length of the longest draft, at which the scales end.
        style: style of the arm.
    """
    top, bottom, width = 10.0, 96.0, 116.0
    left_panel, right_panel = 36.0, 184.0
    lengths = run.arms[arm].histograms().accepted
    steps = [count / (sum(lengths) or 1) for count in lengths]
    shares = run.arms[arm].acceptance_by_position()
    y = linear_scale(0.0, 1.0, bottom, top)
    parts = [
        line(left, y(share), left + width, y(share), "axis")
        for left in (left_panel, right_panel)
        for share in (0.0, 0.5, 1.0)
    ]
    parts += [text(30, y(share) + 4, f"{share:.0%}", text_anchor="end") for share in (0.0, 0.5, 1.0)]
    slot = width / (longest + 1)
    for length, share in enumerate(steps):
        left = left_panel + slot * (length + 0.15)
        parts.append(rectangle(left, y(share), slot * 0.7, bottom - y(share), "mark"))
    every = math.ceil((longest + 1) / (width // letters(len(str(longest)) + 1)))
    parts += [
        text(left_panel + slot * (length + 0.5), bottom + 13, str(length), text_anchor="middle")
        for length in range(0, longest + 1, every)
    ]
    parts.append(text(left_panel + width / 2, bottom + 28, "accepted in a step", text_anchor="middle"))
    slot = width / max(longest, 1)
    points = [(right_panel + slot * (i + 0.5), y(share)) for i, share in enumerate(shares) if math.isfinite(share)]
    parts.append(path(points))
    parts += [mark(*point, style, 3) for point in points]
    parts += [
        text(right_panel + slot * (position - 0.5), bottom + 13, str(position), text_anchor="middle")
        for position in range(1, longest + 1, every)
    ]
    parts.append(text(right_panel + width / 2, bottom + 28, "position in the draft", text_anchor="middle"))
    by_length = ", ".join(f"{length}: {share:.0%}" for length, share in enumerate(steps))
    by_position = ", ".join(f"{position}: {share:.0%}" for position, share in enumerate(shares, start=1))
    description = f"steps by accepted length: {by_length}; accepted by position: {by_position}"
    return drawing(308, bottom + 32, f"Acceptance of {arm}", description, *parts, colour=style.colour)


def load_curves(curves: Mapping[str, Mapping[int, Estimate]], looks: Mapping[str, Style]) -> Element:
    """Draw the speedup against concurrency, with its intervals: a line for each drafting arm.

    Args:
        curves: speedups of each arm by concurrency; nan if unknown.
        looks: style of each arm.
    """
    width, bottom, top = 300.0, 150.0, 10.0
    numbers = sorted({number for speedups in curves.values() for number in speedups})
    known = {name: {n: s for n, s in by.items() if math.isfinite(s.value)} for name, by in curves.items()}
    ends = [end for speedups in known.values() for s in speedups.values() for end in (s.low, s.high)]
    low, high = math.log2(numbers[0]), math.log2(numbers[-1])
    x = Scale(math.log2, low - 0.06 * (high - low), high + 0.06 * (high - low), 44.0, width - 10.0, [])
    y = log_scale([1.0, *ends], bottom, top, math.log(1.5))
    parts = axes(x, y, [(x(number), str(number)) for number in numbers], "prompts at a time")
    parts.append(line(x.start, y(1.0), x.end, y(1.0), "one"))
    said = []
    for place, (name, speedups) in enumerate(known.items()):
        # Shifted sideways, so that no interval hides another.
        beside = 4.0 * (place - (len(known) - 1) / 2)
        points = {number: (x(number) + beside, y(speedup.value)) for number, speedup in speedups.items()}
        whiskers = [line(points[n][0], y(s.low), points[n][0], y(s.high), "whisker") for n, s in speedups.items()]
        marks = [mark(*point, looks[name]) for point in points.values()]
        parts.append(series(looks[name], path(list(points.values())), *whiskers, *marks))
        said += [f"{name} at {number}: {speedup}" for number, speedup in speedups.items()]
    return drawing(width, bottom + 34, "Speedup by concurrency", "; ".join(said) or "none is known", *parts)


def course(name: str, runs: Sequence[RunFile], speedups: Sequence[Estimate], least: float, style: Style) -> Element:
    """Draw an arm's speedup in each run, with its intervals.

    Args:
        name: names of the arm and its reference arm.
        runs: the runs, the oldest first.
        speedups: speedup in each run; nan if unknown.
        least: smallest span of the scale, as a natural logarithm.
        style: style of the arm.
    """
    known = [(i, speedup) for i, speedup in enumerate(speedups) if math.isfinite(speedup.value)]
    ends = [end for _, speedup in known for end in (speedup.low, speedup.high)]
    x = linear_scale(0, len(speedups) - 1, 44.0, 256.0)
    y = log_scale(ends, 92, 10, max(least, math.log(1.1)))
    left, right, last = x.start, x.end, len(speedups) - 1
    parts = [line(left - 8, y(tick), right + 8, y(tick), "one" if tick == 1 else "axis") for tick in y.ticks]
    parts += [text(30, y(tick) + 4, f"{tick:g}", text_anchor="end") for tick in y.ticks]
    parts.append(path([(x(i), y(speedup.value)) for i, speedup in known]))
    for i, speedup in known:
        parts.append(line(x(i), y(speedup.low), x(i), y(speedup.high), "whisker"))
        parts.append(mark(x(i), y(speedup.value), style, 4 if i == last else 2.5))
    latest, speedup = known[-1]
    if latest == last:
        parts.append(text(right + 12, y(speedup.value) + 4, f"{speedup.value:.2f}", class_="value"))
    parts += [text(left - 8, 114, runs[0].date), text(right + 8, 114, runs[-1].date, text_anchor="end")]
    description = ", ".join(f"{runs[i].date} {runs[i].commit}: {speedup}" for i, speedup in known)
    return drawing(300, 118, f"Speedup of {name}, run by run", description, *parts, colour=style.colour)
