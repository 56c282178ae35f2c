"""Runs as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from specdecode.bench.gate.blame import Blame
from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import FAILING, Judgement, Verdict
from specdecode.bench.report.captions import (
    LIMITS,
    MEMORY,
    MODEL,
    cells,
    command,
    drafts,
    failing_first,
    label,
    models,
    notes,
)
from specdecode.bench.report.elements import Element, element, grid_table, head_cell, scrolling, tile
from specdecode.bench.report.grid import Grid
from specdecode.bench.report.palette import places
from specdecode.bench.report.tables import (
    by_model,
    by_part,
    limits,
    memory,
    past_speedups,
    speeds,
    surroundings,
    timeline,
)
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import Estimate

_SIGNS = {
    Verdict.REGRESSED: ("bad", "✗"),
    Verdict.MISSING: ("bad", "✗"),
    Verdict.INCONCLUSIVE: ("warn", "?"),
    Verdict.NO_BASELINE: ("warn", "+"),
    Verdict.WRONG_HARDWARE: ("warn", "≠"),
    Verdict.NOT_JUDGED: ("warn", "-"),
    Verdict.IMPROVED: ("good", "▲"),
    Verdict.PASS: ("good", "✓"),
}
"""The colour of a verdict, and its sign for those who do not see colours."""


def section(
    run: RunFile, title: str, judged_by: str, judgements: Sequence[Judgement], past: History | None = None
) -> list[Element]:
    """What is told of one run; arguments as for `report.markdown`."""
    styles = _styles(run)
    return [
        *_heading(run, title, judgements),
        *_verdicts(judged_by, judgements),
        *_speeds(run, styles),
        *_parts(run),
        *_acceptance(run, styles),
        *_table("What limits the speedup", limits(run), LIMITS, "Speedups as products"),
        *_table("By the model", by_model(run), MODEL, "Speedups by the model"),
        *_table("Memory", memory(run), MEMORY, "Memory of each arm"),
        *(_history(run, past, styles) if past else []),
        *_about(run),
    ]


class _Style(NamedTuple):
    """How an arm looks wherever it is drawn: a colour, and hollow marks for what is not this package's."""

    colour: str
    hollow: bool

    @property
    def mark(self) -> str:
        return "hollow" if self.hollow else "mark"


def _styles(run: RunFile) -> dict[str, _Style]:
    """The colour of each arm's method."""
    classes = {arm: "plain" if place is None else f"c{place}" for arm, place in places(run).items()}
    return {arm: _Style(classes[arm], record.peer) for arm, record in run.arms.items()}


def _heading(run: RunFile, title: str, judgements: Sequence[Judgement]) -> list[Element]:
    made = [title.removeprefix(f"{models(run)}, "), *filter(None, [run.date, run.commit and f"commit {run.commit}"])]
    failing = sum(judged.verdict in FAILING["on"] for judged in judgements)
    wrong = [arm for arm, record in run.arms.items() if record.bugs]
    ties = sum(record.ties for record in run.arms.values())
    if not judgements:
        gate = tile("Verdicts", "warn", "Not judged", "there is no baseline to judge by")
    elif failing:
        gate = tile("Verdicts", "bad", f"✗ {failing} of {len(judgements)} fail", "see below")
    else:
        gate = tile("Verdicts", "good", "✓ None fails", f"of {len(judgements)}")
    if wrong:
        outcome = tile("Outputs", "bad", "✗ WRONG", f"of {', '.join(wrong)}: their times are void")
    else:
        whose = (
            "ar's, a lossy arm's its own reference's" if any(record.lossy for record in run.arms.values()) else "ar's"
        )
        outcome = tile(
            "Outputs", "good", "✓ Right", f"every token is {whose}{f', but for {ties} ties' if ties else ''}"
        )
    tiles = [gate, outcome]
    speedups = {arm: run.speedup(arm) for arm in run.arms if arm != BASELINE and arm not in wrong}
    speedups = {arm: speedup for arm, speedup in speedups.items() if math.isfinite(speedup.value)}
    if speedups:
        best = max(speedups, key=lambda arm: speedups[arm].value)
        tiles.append(tile("Fastest", "", f"{speedups[best].value:.2f} times ar", label(run, best)))
    tiles.append(tile("A/A floor", "", f"{math.expm1(run.header.floor):.1%}", "what two runs of ar differ by"))
    return [
        element("header", element("h1", models(run)), element("p", " · ".join(made), class_="lead")),
        element("dl", *tiles, class_="tiles"),
    ]


def _verdicts(judged_by: str, judgements: Sequence[Judgement]) -> list[Element]:
    """What does not simply pass, the failing first; what passes, folded away. Same reasons are told once."""
    groups: dict[tuple[Verdict, str], list[Judgement]] = {}
    for judged in failing_first(judgements):
        groups.setdefault((judged.verdict, judged.reason), []).append(judged)
    blames = [judged.blame for judged in judgements if judged.blame]
    widest = max((abs(share) for blame in blames for share in blame.shares.values()), default=0.0)
    items = {key: _verdict(group, max(widest, math.log(1.05))) for key, group in groups.items()}
    shown = [item for (verdict, _), item in items.items() if verdict is not Verdict.PASS]
    passing = [item for (verdict, _), item in items.items() if verdict is Verdict.PASS]
    made = [element("h2", "Verdicts"), element("p", judged_by, class_="soft")]
    if blames:
        legend = "Bars: by how much each part of a step changed the time per token; to the right is slower."
        made.append(element("p", legend, class_="soft"))
    if shown:
        made.append(element("ul", *shown, class_="verdicts"))
    if passing:
        count = sum(judged.verdict is Verdict.PASS for judged in judgements)
        summary = element("summary", f"{count} {'verdicts pass' if count > 1 else 'verdict passes'}")
        made.append(element("details", summary, element("ul", *passing, class_="verdicts")))
    return made


def _verdict(group: Sequence[Judgement], widest: float) -> Element:
    first = group[0]
    kind, sign = _SIGNS[first.verdict]
    arms, gates = (", ".join(dict.fromkeys(names)) for names in ([j.arm for j in group], [j.gate for j in group]))
    reason = first.reason.removesuffix(f"; {first.blame}").replace("->", "→")
    return element(
        "li",
        element("span", f"{sign} {first.verdict.value}", class_=f"chip {kind}"),
        element("div", element("h3", f"{arms}: {gates}"), element("p", reason)),
        *(_blame(judged.arm, judged.blame, widest) for judged in group if judged.blame),
    )


def _blame(arm: str, blame: Blame, widest: float) -> Element:
    """A bar for each cause, from the middle to the right where it made the arm slower."""
    width, height, middle, reach = 300, 17, 178, 62
    parts: list[Element] = []
    for i, (cause, share) in enumerate(blame.shares.items()):
        top = height * i
        length = reach * abs(share) / widest
        bold = {"class_": "value"} if cause == blame.main else {}
        parts += [
            _text(0, top + 12, cause, **bold),
            element(
                "rect",
                x=_at(middle - (length if share < 0 else 0)),
                y=top + 3,
                width=_at(max(length, 0.5)),
                height=height - 6,
                class_=f"mark {'slower' if share > 0 else 'faster'}",
            ),
            _text(width, top + 12, f"{math.expm1(share):+.1%}", text_anchor="end", **bold),
        ]
    bottom = height * len(blame.shares)
    parts.append(_line(middle, 0, middle, bottom, "one"))
    drawing = _drawing(width, bottom, f"Change of the time per token of {arm}, by cause", str(blame), *parts)
    drawing.set("style", "width: 18.75rem; max-width: 100%")
    return drawing


def _speeds(run: RunFile, styles: dict[str, _Style]) -> list[Element]:
    """The table of speeds, with a plot of the speedups as its second column."""
    grid = speeds(run)
    speedups = {arm: run.speedup(arm) for arm in run.arms}
    promised = {arm: run.predicted_speedup(arm) for arm in run.arms}
    drawn = [end for of in speedups.values() for end in (of.low, of.high)] + [
        *promised.values(),
        math.exp(run.header.floor),
    ]
    scale = _scale([*drawn, math.exp(-run.header.floor)], 14, _WIDE - 14, least=math.log(1.5))
    heads = [head_cell(column.name, column.figures) for column in grid.columns]
    heads.insert(1, element("th", _ruler(scale), class_="plot", scope="col"))
    rows = []
    for arm, (name, *values, output) in zip(run.arms, grid.rows, strict=True):
        style = styles[arm]
        row = [element("th", _swatch(style), name, scope="row", title=name)]
        row.append(element("td", _interval(arm, speedups[arm], promised[arm], run, scale, style), class_="plot"))
        for value in values:
            number, _, interval = value.partition(" ")
            row.append(
                element("td", number, *([element("small", f" {interval}")] if interval else []), class_="figure")
            )
        kind, sign = ("bad", "✗") if run.arms[arm].bugs else ("good", "✓")
        rows.append(element("tr", *row, element("td", element("span", f"{sign} {output}", class_=f"chip {kind}"))))
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="speeds")
    legend = (
        "Speedup over ar: dot and 95 % interval, on a logarithmic scale. The grey band is the A/A floor, within which"
        " two runs of ar differ; the upright stroke is the predicted speedup. Hollow: transformers."
    )
    return [element("h2", "Speed"), element("p", legend, class_="soft"), scrolling(table, "Speed of each arm")]


_WIDE, _ROW = 208, 36


def _ruler(scale: _Scale) -> Element:
    ticks = [_text(scale(tick), 14, f"{tick:g}", text_anchor="middle") for tick in scale.ticks]
    return _drawing(_WIDE, 20, "Scale of the speedups over ar", "logarithmic", *ticks)


def _interval(arm: str, speedup: Estimate, promised: float, run: RunFile, scale: _Scale, style: _Style) -> Element:
    floor = math.exp(run.header.floor)
    left, right = scale(1 / floor), scale(floor)
    parts = [element("rect", x=_at(left), y=0, width=_at(right - left), height=_ROW, class_="band")]
    parts += [_line(scale(tick), 0, scale(tick), _ROW, "axis") for tick in scale.ticks if tick != 1]
    parts.append(_line(scale(1.0), 0, scale(1.0), _ROW, "one"))
    said = "no speedup: no output was right"
    if math.isfinite(promised):
        parts.append(_line(scale(promised), 9, scale(promised), _ROW - 9, "promise"))
    if math.isfinite(speedup.value):
        said = f"{speedup.value:.2f}, 95 % interval from {speedup.low:.2f} to {speedup.high:.2f}"
        low, value, high = (scale(ratio) for ratio in (speedup.low, speedup.value, speedup.high))
        parts += [_line(x, _ROW / 2 - 4, x, _ROW / 2 + 4, "whisker") for x in (low, high)]
        parts += [_line(low, _ROW / 2, high, _ROW / 2, "whisker"), _dot(value, _ROW / 2, style)]
    if math.isfinite(promised):
        said += f"; predicted {promised:.2f}"
    return _drawing(_WIDE, _ROW, f"Speedup of {arm} over ar", said, *parts, style=style)


def _parts(run: RunFile) -> list[Element]:
    grid = by_part(run)
    if not grid.rows:
        return []
    summary = element("summary", f"By task and length: {len(grid.rows)} rows")
    return [element("details", summary, scrolling(grid_table(grid), "Speed by task and length"))]


def _acceptance(run: RunFile, styles: dict[str, _Style]) -> list[Element]:
    """For each arm that drafts, how many proposals a step accepts, and which share of them at each position."""
    drafting = [arm for arm, record in run.arms.items() if drafts(record)]
    if not drafting:
        return []
    histograms = [run.arms[arm].histograms() for arm in drafting]
    longest = max(len(entries) for steps in histograms for entries in (steps.accepted, steps.depth)) - 1
    legend = (
        "On the left the share of steps that accepted so many proposals; on the right the share of the proposals at"
        " each position of the draft that were accepted. The scales are the same for all arms."
    )
    cards = []
    for arm in drafting:
        length, rate = cells(run, arm, ["mean_acceptance_length", "acceptance_rate"])
        told = f"τ {length} tokens a step" + (f", {rate} of proposals accepted" if rate else "")
        cards.append(_card(run, arm, styles[arm], told, _acceptance_plot(run, arm, longest, styles[arm])))
    return [
        element("h2", "Acceptance"),
        element("p", legend, class_="soft"),
        element("div", *cards, class_="cards"),
    ]


def _acceptance_plot(run: RunFile, arm: str, longest: int, style: _Style) -> Element:
    top, bottom, panels = 10.0, 96.0, ((36.0, 152.0), (184.0, 300.0))
    lengths = run.arms[arm].histograms().accepted
    steps = [count / (sum(lengths) or 1) for count in lengths]
    shares = run.arms[arm].acceptance_by_position()

    def height(share: float) -> float:
        return bottom - (bottom - top) * share

    parts: list[Element] = []
    for left, right in panels:
        parts += [_line(left, height(share), right, height(share), "axis") for share in (0.0, 0.5, 1.0)]
    parts += [_text(30, height(share) + 4, f"{share:.0%}", text_anchor="end") for share in (0.0, 0.5, 1.0)]
    left, right = panels[0]
    slot = (right - left) / (longest + 1)
    for length, share in enumerate(steps):
        x, y = left + slot * (length + 0.15), height(share)
        parts.append(element("rect", x=_at(x), y=_at(y), width=_at(slot * 0.7), height=_at(bottom - y), class_="mark"))
    every = math.ceil((longest + 1) / 9)
    parts += [
        _text(left + slot * (at + 0.5), bottom + 13, str(at), text_anchor="middle")
        for at in range(0, longest + 1, every)
    ]
    parts.append(_text((left + right) / 2, bottom + 28, "accepted in a step", text_anchor="middle"))
    left, right = panels[1]
    slot = (right - left) / max(longest, 1)
    points = [(left + slot * (at + 0.5), height(share)) for at, share in enumerate(shares) if math.isfinite(share)]
    parts.append(_path(points))
    parts += [_dot(x, y, style, 3) for x, y in points]
    parts += [
        _text(left + slot * (at - 0.5), bottom + 13, str(at), text_anchor="middle")
        for at in range(1, longest + 1, every)
    ]
    parts.append(_text((left + right) / 2, bottom + 28, "position in the draft", text_anchor="middle"))
    said = "; ".join(
        [
            "steps by accepted length: " + ", ".join(f"{at}: {share:.0%}" for at, share in enumerate(steps)),
            "accepted by position: " + ", ".join(f"{at}: {share:.0%}" for at, share in enumerate(shares, start=1)),
        ]
    )
    return _drawing(308, bottom + 32, f"Acceptance of {arm}", said, *parts, style=style)


def _table(title: str, grid: Grid, told: str, name: str) -> list[Element]:
    """A table with its heading and what it does not say by itself; nothing where it has no rows."""
    if not grid.rows:
        return []
    return [element("h2", title), element("p", told, class_="soft"), scrolling(grid_table(grid), name)]


def _history(run: RunFile, past: History, styles: dict[str, _Style]) -> list[Element]:
    """Every arm's speedup over the runs that were the baseline, and in this one."""
    made = [element("h2", "History"), element("p", past.summary, class_="soft")]
    if not past.runs:
        return made
    runs = timeline(run, past)
    if len(runs) > 1:
        courses = {arm: [then.speedup(arm) if arm in then.arms else _UNKNOWN for then in runs] for arm in run.arms}
        seen = {arm: [of for of in course if math.isfinite(of.value)] for arm, course in courses.items()}
        # One span for all, each around its own middle: a change is as tall in one plot as in the next.
        least = max(
            math.log(max(of.high for of in all_) / min(of.low for of in all_)) for all_ in seen.values() if all_
        )
        cards = [
            _card(run, arm, styles[arm], "", _course(arm, runs, courses[arm], least, styles[arm]))
            for arm in run.arms
            if seen[arm] and arm != BASELINE
        ]
        legend = "Speedup over ar with 95 % intervals; the last mark is this run. A change is as tall in every plot."
        made += [element("p", legend, class_="soft"), element("div", *cards, class_="cards")]
    return [*made, scrolling(grid_table(past_speedups(run, past)), "Speedups of earlier runs")]


_UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def _course(arm: str, runs: Sequence[RunFile], course: Sequence[Estimate], least: float, style: _Style) -> Element:
    known = [(i, of) for i, of in enumerate(course) if math.isfinite(of.value)]
    scale = _scale([end for _, of in known for end in (of.low, of.high)], 92, 10, max(least, math.log(1.1)))
    left, right = 44.0, 256.0

    def across(i: int) -> float:
        return left + (right - left) * i / (len(course) - 1)

    parts = [
        _line(left - 8, scale(tick), right + 8, scale(tick), "one" if tick == 1 else "axis") for tick in scale.ticks
    ]
    parts += [_text(30, scale(tick) + 4, f"{tick:g}", text_anchor="end") for tick in scale.ticks]
    parts.append(_path([(across(i), scale(of.value)) for i, of in known]))
    for i, of in known:
        parts.append(_line(across(i), scale(of.low), across(i), scale(of.high), "whisker"))
        parts.append(_dot(across(i), scale(of.value), style, 4 if i == len(course) - 1 else 2.5))
    if known[-1][0] == len(course) - 1:
        parts.append(_text(right + 12, scale(known[-1][1].value) + 4, f"{known[-1][1].value:.2f}", class_="value"))
    parts += [_text(left - 8, 114, runs[0].date), _text(right + 8, 114, runs[-1].date, text_anchor="end")]
    said = ", ".join(f"{runs[i].date} {runs[i].commit}: {of}" for i, of in known)
    return _drawing(300, 118, f"Speedup of {arm} over ar, run by run", said, *parts, style=style)


def _about(run: RunFile) -> list[Element]:
    tables = [scrolling(grid_table(grid), grid.columns[0].name) for grid in surroundings(run)]
    # Lines end between options, not at the hyphens in them.
    words = [part for word in command(run).split(" ") for part in (element("span", word), " ")]
    return [
        element("h2", "How it was measured"),
        element("ul", *(element("li", note) for note in notes(run)), class_="notes"),
        element("div", *tables, class_="facts"),
        element("p", "To measure the same again:", class_="soft"),
        element("pre", element("code", *words)),
    ]


def _card(run: RunFile, arm: str, style: _Style, told: str, drawing: Element) -> Element:
    said = [element("p", told)] if told else []
    return element("figure", element("h3", _swatch(style), label(run, arm)), *said, drawing, class_="card")


def _swatch(style: _Style) -> Element:
    background = "transparent" if style.hollow else "currentColor"
    return element("span", class_=f"swatch {style.colour}", style=f"background: {background}")


class _Scale(NamedTuple):
    """A logarithmic scale of ratios.

    Attributes:
        low, high: the logarithms at its ends.
        start, end: where these are drawn.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, ratio: float) -> float:
        return self.start + (self.end - self.start) * (math.log(ratio) - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round ratios, six at most: multiples of a step where the ends are near each other, else 1, 2, 5, 10 ..."""
        low, high = math.exp(self.low), math.exp(self.high)
        if high / low < 4:
            steps = (figure * 10.0**power for power in range(-6, 300) for figure in (1, 2, 5))
            step = next(step for step in steps if high / step - low / step < 5.5)
            return [float(f"{step * i:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [figure * 10.0**power for power in powers for figure in (1, 2, 5)]
        found = [tick for tick in found if low <= tick <= high]
        return found[:: math.ceil(len(found) / 6)]


def _scale(ratios: Iterable[float], start: float, end: float, least: float) -> _Scale:
    """A scale that holds all of the ratios and spans at least so much, in logarithms."""
    logs = [math.log(ratio) for ratio in ratios if math.isfinite(ratio)]
    middle = (max(logs) + min(logs)) / 2
    half = max(max(logs) - min(logs), least) / 2 * 1.08
    return _Scale(middle - half, middle + half, start, end)


def _drawing(
    width: float, height: float, name: str, said: str, *parts: Element, style: _Style | None = None
) -> Element:
    """An SVG that says in words what it shows."""
    return element(
        "svg",
        element("title", name),
        element("desc", said),
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        class_=style.colour if style else "plain",
        aria_label=f"{name}: {said}",
    )


def _text(x: float, y: float, text: str, **attributes: object) -> Element:
    return element("text", text, x=_at(x), y=_at(y), **attributes)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    return element("line", x1=_at(x1), y1=_at(y1), x2=_at(x2), y2=_at(y2), class_=kind)


def _dot(x: float, y: float, style: _Style, radius: float = 3.5) -> Element:
    return element("circle", cx=_at(x), cy=_at(y), r=radius, class_=style.mark)


def _path(points: Sequence[tuple[float, float]]) -> Element:
    return element("polyline", points=" ".join(f"{_at(x)},{_at(y)}" for x, y in points), class_="rule")


def _at(place: float) -> str:
    return f"{place:.1f}"
