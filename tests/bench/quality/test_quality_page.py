"""The HTML page of a run of the quality suite: its charts, read back from the drawings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest

from specdecode.bench.quality.curves import CURVES
from specdecode.bench.quality.quality_charts import (
    cache_styles,
    cost_by_speed,
    curve_chart,
    needle_tiles,
    perplexity_by_cache,
)
from specdecode.bench.quality.quality_page import section
from specdecode.bench.quality.tradeoff import tradeoff
from specdecode.bench.report.drawing import cache_looks
from specdecode.bench.report.elements import document
from specdecode.bench.report.palette import COLOURS, PLAIN
from specdecode.bench.report.speed_charts import styles
from specdecode.bench.report.svg import linear_scale, log_scale, log_scale_with_zero, names
from specdecode.evals.margins import check_margins
from tests.helpers.browser import CHROMIUM, look_at
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.quality_runs import ARMS, quality_run, quality_speeds, whole_quality_run, whole_speeds


def ticks(chart: Element, axis: str) -> dict[float, float]:
    """Return the places of an axis's ticks by their values."""
    anchor = {"x": "middle", "y": "end"}[axis]
    found = {}
    for text in chart.iter("text"):
        number = str(text.text).replace(",", "")
        if text.get("text-anchor") == anchor and number.replace(".", "").replace("-", "").isdigit():
            # The middle of a letter is a little above its baseline.
            found[float(number)] = float(text.attrib[axis]) - (4 if axis == "y" else 0)
    return found


def value_at(place: float, places: dict[float, float]) -> float:
    """Return the value at a place of a linear axis, from the first and last ticks."""
    (low, start), *_, (high, end) = sorted(places.items())
    return low + (high - low) * (place - start) / (end - start)


def groups(chart: Element) -> list[Element]:
    return list(chart.iter("g"))


def places(line: Element) -> list[tuple[float, float]]:
    """Return the points of a line."""
    return [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]  # type: ignore[misc]


def test_marks_and_intervals_stand_at_their_values() -> None:
    """Guards against axes that are swapped or upside down, and an interval of the other measure."""
    points = tradeoff(whole_quality_run(), whole_speeds()).drawable
    chart = cost_by_speed(points, "ar", {point.arm: point.arm for point in points}, styles(whole_speeds()))
    across, up = ticks(chart, "x"), ticks(chart, "y")
    assert len(groups(chart)) == len(points) > 5
    for point, group in zip(points, groups(chart), strict=True):
        (mark,) = group.iter("circle")
        speed_line, cost_line = group.iter("line")
        assert value_at(float(mark.attrib["cx"]), across) == pytest.approx(point.speedup.value, abs=0.005)
        assert value_at(float(mark.attrib["cy"]), up) == pytest.approx(point.cost.value, abs=0.002)
        for end, value in (("x1", point.speedup.low), ("x2", point.speedup.high)):
            assert value_at(float(speed_line.attrib[end]), across) == pytest.approx(value, abs=0.005)
        for end, value in (("y1", point.cost.low), ("y2", point.cost.high)):
            assert value_at(float(cost_line.attrib[end]), up) == pytest.approx(value, abs=0.002)
        assert group.attrib["class"] == styles(whole_speeds())[point.arm].colour
    (front,) = [line for line in chart.iter("polyline") if line.attrib["class"] == "front"]
    marks = {
        point.arm: (float(mark.attrib["cx"]), float(mark.attrib["cy"]))
        for point, mark in zip(points, chart.iter("circle"), strict=True)
    }
    assert {marks["linear"], marks["streaming-16"]} <= set(places(front))
    assert marks["streaming-8"] not in places(front)


def test_intervals_without_end_are_not_drawn() -> None:
    """Guards against a chart of few documents that fails, or whose axis is infinite."""
    points = tradeoff(quality_run(ARMS, documents=2), whole_speeds()).drawable
    chart = cost_by_speed(points, "ar", {point.arm: point.arm for point in points}, styles(whole_speeds()))
    assert {len(list(group.iter("line"))) for group in groups(chart)} == {1, 2}
    assert "nan" not in str([element.attrib for element in chart.iter() if element is not chart])
    assert not tradeoff(quality_run({"full": {}}), quality_speeds({"ar": (1.0, {})})).drawable


def test_arms_without_a_margin_are_not_among_those_that_keep_theirs() -> None:
    """Guards against a page that calls every arm harmless where only some have a margin."""
    run = quality_run({arm: ARMS[arm] for arm in ("full", "int8", "sink-window-8")})
    for margins, said in (
        ({"int8": {"nll": 1.0}}, "1 verdict(s) as expected; arms without a margin: 2"),
        ({arm: {"nll": 1.0} for arm in run.arms}, "3 verdict(s) as expected"),
    ):
        assert said in Page(document("x", section(run, check_margins(run, margins), None))).texts


def test_curves_go_through_their_values() -> None:
    """Guards against a curve of another arm or measure, and against a scale that differs from its ticks."""
    tenth = dataclasses.replace(whole_quality_run().documents[0])
    for arm, trace in tenth.arms.items():
        kl = [0.0, 0.01, 0.1, 1.0] * 3 if arm == "full" else [0.0] * 12
        tenth.arms[arm] = dataclasses.replace(trace, kl=kl)
    one = dataclasses.replace(quality_run(ARMS), documents=[tenth])
    by_position, _, agreement = (curve_chart(one, curve) for curve in CURVES)
    assert by_position is not None
    assert agreement is not None
    up, (full, *_) = ticks(by_position, "y"), by_position.iter("polyline")
    assert [y for _, y in places(full)] == [up[value] for value in (0.0, 0.01, 0.1, 1.0)] * 3
    across = ticks(by_position, "x")
    assert [round(value_at(x, across), 1) for x, _ in places(full)] == list(range(1, 13))
    (first, *_), up = agreement.iter("polyline"), ticks(agreement, "y")
    assert [y for _, y in places(first)] == [up[1.0], up[0.0]] * 6
    nothing = curve_chart(quality_run({"full": {}}), CURVES[1])
    assert nothing is None


def test_perplexity_is_drawn_by_cache_for_each_policy() -> None:
    """Guards against a line through caches of different policies, and against an arm drawn as the reference."""
    chart = perplexity_by_cache(whole_quality_run())
    assert chart is not None
    logs = {math.log(value): place for value, place in ticks(chart, "y").items() if value > 5}
    full, *families = groups(chart)
    assert [value_at(y, logs) for _, y in places(full[0])] == pytest.approx(
        [math.log(whole_quality_run().perplexity())] * 2, abs=0.01
    )
    found = [[value_at(y, logs) for _, y in places(family[0])] for family in families]
    arms = [["sink-window-8", "sink-window-16"]] + [
        [arm] for arm in ("key-norm-8", "heavy-hitter-8", "int8-sink-window-8", "random-8", "no-sinks-8")
    ]
    for values, same in zip(found, arms, strict=True):
        assert values == pytest.approx([math.log(whole_quality_run().perplexity(arm)) for arm in same], abs=0.01)
    assert perplexity_by_cache(quality_run({"full": {}})) is None


def test_needles_have_a_tile_for_each_length_and_depth() -> None:
    """Guards against depths that are upside down, lengths swapped with depths, and pale tiles for certain values."""
    chart = needle_tiles(whole_quality_run(), "full")
    tiles = {(float(tile.attrib["x"]), float(tile.attrib["y"])): tile for tile in chart.iter("rect")}
    assert len(tiles) == 4
    top, bottom = sorted({y for _, y in tiles})
    fill = {y: {float(tile.attrib["fill-opacity"]) for place, tile in tiles.items() if place[1] == y} for _, y in tiles}
    assert fill == {top: {0.08}, bottom: {0.77}}
    texts = [str(text.text) for text in chart.iter("text")]
    assert texts[:4] == ["0/1", "1/1", "0/1", "1/1"]
    assert texts[4:8] == ["0", "1", "8", "16"]
    said = "".join(str(part.text) for part in chart.iter("desc"))
    assert "length 16, depth 1: 1 of 1, probability 0.75" in said


def test_an_arm_looks_in_a_page_as_it_does_in_print() -> None:
    """Guards against a colour that means another policy on paper, and arms that look the same."""
    print_looks, page_looks = cache_looks(ARMS), cache_styles(ARMS)
    for arm, look in page_looks.items():
        hue = PLAIN if look.colour == "plain" else COLOURS[int(look.colour.removeprefix("c"))]
        assert hue == print_looks[arm].hue
        assert look.hollow == (print_looks[arm].fill == "none") == ("control" in ARMS[arm])
        assert look.square == ("quantize" in ARMS[arm])
        assert (look.dash == "") == (print_looks[arm].line == "-")
    assert len(set(page_looks.values())) == len(ARMS)


def test_scales_have_round_ticks_and_hold_what_they_must() -> None:
    """Guards against a tick beside its value, and a value beyond the axis."""
    line = linear_scale(-0.3, 1.1, 100.0, 0.0)
    assert line.ticks == [0.0, 0.5, 1.0]
    assert (line(-0.3), line(1.1)) == (100.0, pytest.approx(0.0))
    ratio = log_scale([0.5, 8.0, math.nan], 0.0, 100.0, least=0.1)
    assert ratio.ticks == [0.5, 1.0, 2.0, 5.0]
    assert ratio(1.0) - ratio(0.5) == pytest.approx(ratio(8.0) - ratio(4.0))
    assert 0 < ratio(0.5) < ratio(8.0) < 100
    near = log_scale([1.0], 0.0, 100.0, least=math.log(1.2))
    assert near(1.0) == pytest.approx(50)
    assert near.ticks == [0.95, 1.0, 1.05, 1.1]
    small = log_scale_with_zero(0.5, 0.0, 100.0, 0.01)
    assert small.ticks == [0.0, 0.01, 0.1]
    assert (small(0.0), small(0.5)) == (0.0, pytest.approx(100.0))
    assert small(0.1) - small(0.01) > 2 * small(0.01) > 0


def test_names_cover_neither_marks_nor_each_other() -> None:
    """Guards against names that overlap or reach beyond the drawing."""
    points = {f"arm-{i}": (100.0 + 9 * (i % 4), 50.0 + 9 * (i // 4)) for i in range(12)} | {"edge": (195.0, 150.0)}
    written = {str(text.text): text for text in names(points, 0.0, 200.0)}
    assert "arm-0" in written
    assert written["edge"].get("text-anchor") == "end"
    boxes = []
    for name, text in written.items():
        width, x = 6.2 * len(name), float(text.attrib["x"])
        start = {"start": x, "middle": x - width / 2, "end": x - width}[text.attrib["text-anchor"]]
        boxes.append((start, float(text.attrib["y"]), start + width))
    assert all(left >= 0 and right <= 200 for left, _, right in boxes)
    for i, (left, foot, right) in enumerate(boxes):
        for other_left, other_foot, other_right in boxes[:i]:
            assert abs(foot - other_foot) >= 10 or left >= other_right or other_left >= right
        assert not any(left < x < right and foot - 10 < y < foot for x, y in points.values())


def test_the_page_is_whole_by_itself() -> None:
    """Guards against missing charts, charts without a text description, and names that become HTML elements."""
    page = document("title", section(whole_quality_run(), check_margins(whole_quality_run(), {}), whole_speeds()))
    assert Page(page).drawings.keys() == {
        "Perplexity by cache size",
        *(curve.title for curve in CURVES),
        "Needles that full found",
        "Needles that sink-window-8 found",
        "ΔNLL by speedup over ar",
    }
    for outside in ("http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert outside not in page
    for arm in ARMS:
        assert page.count(f">{arm}<") > 1
    named = quality_run({name: {} for name in HOSTILE}, target=HOSTILE[0])
    hostile = Page(document("title", section(named, check_margins(named, {}), None)))
    assert "script" not in hostile.tags
    assert set(HOSTILE) <= set(hostile.texts)
    assert "ΔNLL by speedup over ar" not in hostile.drawings


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 1440), ("light", 360), ("dark", 360)])
def test_a_browser_shows_the_page(tmp_path: Path, scheme: str, width: int) -> None:
    """Guards against a page that scrolls sideways on a phone, is dark on dark, or loads further files."""
    arms = ARMS | {"a-very-long-name-" * 6: {"policy": "sink-window", "cache": 32}}
    page = document("title", section(quality_run(arms), check_margins(quality_run(arms), {}), whole_speeds()))
    seen = look_at(page, scheme, width, tmp_path)
    assert seen["scroll"] <= width
    assert seen["drawings"] == page.count("<svg") > 10
    ground, ink = seen["ground"], seen["ink"]
    assert (ground < 150 < 600 < ink) if scheme == "dark" else (ink < 150 < 600 < ground)
