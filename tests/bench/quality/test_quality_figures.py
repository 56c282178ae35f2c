"""Reports and figures of quality, alone and against speed: `specdecode report QUALITY --speed RUN`."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdecode.bench.quality.quality_figures import draw
from specdecode.bench.quality.quality_page import section
from specdecode.bench.quality.quality_tables import margins, markdown, title
from specdecode.bench.quality.tradeoff import NO_COST, about_speed, against_speed, tradeoff
from specdecode.bench.report.captions import plain
from specdecode.bench.report.drawing import cache_looks, figure_bytes, looks
from specdecode.bench.report.elements import document
from specdecode.bench.report.palette import COLOURS, PLAIN, POLICIES
from specdecode.evals.margins import check_margins
from specdecode.evals.results_file import write
from tests.helpers.command_line import exit_code
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.print_figures import series, texts, unreadable
from tests.helpers.quality_runs import (
    ARMS,
    SPEEDS,
    WINDOW,
    quality_run,
    quality_speeds,
    whole_quality_run,
    whole_speeds,
)
from tests.helpers.speed_runs import content

FORMATS = ("md", "html", "latex")


@cache
def drawn() -> dict[str, Figure | str]:
    return draw(whole_quality_run(), whole_speeds())


def panels(name: str) -> list[Axes]:
    figure = drawn()[name]
    assert isinstance(figure, Figure), figure
    return figure.axes


# Quality against speed.


def test_arms_are_joined_by_how_they_decode_their_target() -> None:
    """Guards against another cache's cost beside an arm, a draft that changes the cost, and arms that are silently left
    out.
    """
    found = tradeoff(whole_quality_run(), whole_speeds())
    assert {point.arm: point.judged for point in found.points} == {
        "ar": None,
        "ar-8": "sink-window-8",
        "linear": None,
        "streaming-16": "sink-window-16",
        "streaming-8": "sink-window-8",
        "lookup-int8": "int8",
        "hf-generate": None,
    }
    for point in found.points:
        assert point.speedup == whole_speeds().speedup(point.arm)
        assert point.cost == (whole_quality_run().cost(point.judged, "nll") if point.judged else NO_COST)
    assert found.unjudged == ["lookup-32"]
    assert found.unmeasured == ["key-norm-8", "heavy-hitter-8", "int8-sink-window-8"]
    told = " ".join(about_speed(whole_quality_run(), whole_speeds()))
    assert "not judged: lookup-32." in told
    assert "not measured: key-norm-8, heavy-hitter-8, int8-sink-window-8." in told


def test_all_speedups_are_over_one_arm_which_is_named() -> None:
    """Guards against a Pareto front of ratios to different arms, and a reference arm under another's name."""
    own = dataclasses.replace(whole_speeds().arms["lookup-int8"], baseline="ar-8")
    header = dataclasses.replace(whole_speeds().header, baseline="hf-generate")
    speeds = dataclasses.replace(whole_speeds(), header=header, arms=whole_speeds().arms | {"lookup-int8": own})
    for point in tradeoff(whole_quality_run(), speeds).points:
        assert point.speedup == speeds.speedup(point.arm, "hf-generate")
    assert "speedup over hf-generate" in {column.name for column in against_speed(whole_quality_run(), speeds).columns}
    figure = draw(whole_quality_run(), speeds)["cost-against-speed"]
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_xlabel() == "speedup over hf-generate"
    page = Page(document("title", section(whole_quality_run(), [], speeds)))
    assert "ΔNLL by speedup over hf-generate" in page.drawings
    assert "over ar" not in page.text


@pytest.mark.parametrize("fault", [{"bugs": 1}, {"failure": "it died"}, {"bugs": 3, "rows": {}}], ids=str)
def test_void_times_are_named_and_not_compared(fault: dict[str, Any]) -> None:
    """Guards against a wrong output that is on the Pareto front, or that is left out silently."""
    arms = whole_speeds().arms | {"streaming-16": dataclasses.replace(whole_speeds().arms["streaming-16"], **fault)}
    speeds = dataclasses.replace(whole_speeds(), arms=arms)
    assert "streaming-16" not in {point.arm for point in tradeoff(whole_quality_run(), speeds).points}
    assert "Left out, as they failed or wrote a wrong output: streaming-16." in about_speed(whole_quality_run(), speeds)


def test_a_policy_with_other_settings_is_another_policy() -> None:
    """Guards against the cost of four attention sinks beside the speed of an arm with two."""
    arms = {"ar": (1.0, {}), "lookup-8": (1.7, {"drafter": "lookup", "k": 3} | WINDOW | {"cache": 8, "sinks": 2})}
    speeds = quality_speeds(arms | {"ar-8": (1.1, WINDOW | {"cache": 8})})
    judged = {point.arm: point.judged for point in tradeoff(whole_quality_run(), speeds).points}
    assert judged == {"ar": None, "ar-8": "sink-window-8"}
    assert plain(speeds, "lookup-8") is None
    assert plain(quality_speeds(SPEEDS), "streaming-8") == "ar-8"


def test_a_cost_that_is_not_known_is_not_taken_for_none() -> None:
    """Guards against a lossy arm that seems to lose nothing because its file is older or its texts are shorter than its
    cache.
    """
    older = {arm: dataclasses.replace(record, options={}) for arm, record in whole_speeds().arms.items()}
    found = tradeoff(whole_quality_run(), dataclasses.replace(whole_speeds(), arms=older))
    assert [point.arm for point in found.points] == ["ar", "linear", "hf-generate"]
    assert len(found.unjudged) == 5
    short = [
        dataclasses.replace(
            document,
            arms=document.arms
            | {"sink-window-16": dataclasses.replace(document.arms["sink-window-16"], since=[0] * 12)},
        )
        for document in whole_quality_run().documents
    ]
    assert tradeoff(dataclasses.replace(whole_quality_run(), documents=short), whole_speeds()).unjudged == [
        "streaming-16",
        "lookup-32",
    ]
    with pytest.raises(
        ValueError, match=r"quality was judged for t in float32, but speed was measured for u in float32"
    ):
        tradeoff(whole_quality_run(), quality_speeds(SPEEDS, target="u"))


def test_the_table_has_speed_and_cost_side_by_side() -> None:
    """Guards against a row whose cells belong to two arms."""
    grid = against_speed(whole_quality_run(), whole_speeds())
    rows = {row[0]: row[1:] for row in grid.rows}
    cost, kl = (whole_quality_run().cost("sink-window-8", measure) for measure in ("nll", "kl"))
    ppl = f"{whole_quality_run().perplexity('sink-window-8'):.3f}"
    for arm in ("ar-8", "streaming-8"):
        assert rows[arm] == ["sink-window-8", f"{whole_speeds().speedup(arm)}", f"{cost:.4f}", f"{kl:.4f}", ppl]
    assert rows["linear"][0] == "reference"
    assert rows["linear"][-1] == f"{whole_quality_run().perplexity():.3f}"
    assert {len(row) for row in grid.rows} == {len(grid.columns)}


# The content of each figure.


def test_perplexity_is_drawn_by_cache_for_each_policy() -> None:
    """Guards against a line through caches of different policies, and against an arm drawn as the reference."""
    (axes,) = panels("ppl-by-cache")
    found = series(axes)
    assert [y for _, y in found.pop("full cache")] == [whole_quality_run().perplexity()] * 2
    told = {name: [(round(x), y) for x, y in points] for name, points in found.items()}
    assert told == {
        "sink-window": [
            (0, whole_quality_run().perplexity("sink-window-8")),
            (1, whole_quality_run().perplexity("sink-window-16")),
        ],
        **{
            arm.removesuffix("-8"): [(0, whole_quality_run().perplexity(arm))]
            for arm in ("key-norm-8", "heavy-hitter-8", "int8-sink-window-8", "random-8", "no-sinks-8")
        },
    }
    assert len({points[0][0] for points in found.values()}) == len(found)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16"]


def test_divergence_is_drawn_for_every_arm() -> None:
    """Guards against a panel with another measure than its axis names, and an arm that is left out."""
    of = (("kl", "position"), ("kl", "since"), ("agrees", "position"))
    for axes, (measure, along) in zip(panels("divergence"), of, strict=True):
        curves = {arm: whole_quality_run().curve(arm, measure, along) for arm in ARMS}
        assert series(axes) == {arm: curve for arm, curve in curves.items() if curve}
    assert "since" in panels("divergence")[1].get_xlabel()
    figure = drawn()["divergence"]
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ARMS)


def test_needles_have_a_tile_for_each_length_and_depth() -> None:
    """Guards against depths that are upside down, and against lengths swapped with depths."""
    *found, bar = panels("needles")
    assert [axes.get_title() for axes in found] == ["full", "sink-window-8"]
    assert [label.get_text() for label in found[0].get_yticklabels()] == ["0", "1"]
    for axes in found:
        (image,) = axes.images
        assert np.allclose(image.get_array(), [[math.exp(-10)] * 2, [0.75] * 2])
        told = {text.get_position(): text.get_text() for text in axes.texts}
        assert told == {(0, 0): "0/1", (1, 0): "0/1", (0, 1): "1/1", (1, 1): "1/1"}
    assert "probability" in bar.get_ylabel()


def test_cost_is_drawn_against_speed_with_both_intervals() -> None:
    """Guards against swapped axes, an interval of the other measure, and a Pareto front with a beaten point."""
    (axes,) = panels("cost-against-speed")
    bars = {container.get_label(): container for container in axes.containers}
    points = {point.arm: point for point in tradeoff(whole_quality_run(), whole_speeds()).points}
    assert bars.keys() == points.keys()
    for arm, point in points.items():
        marks, _, (across, up) = bars[arm]
        assert series(axes)[arm] == [(point.speedup.value, point.cost.value)]
        assert sorted(x for x, _ in across.get_segments()[0]) == pytest.approx([point.speedup.low, point.speedup.high])
        assert sorted(y for _, y in up.get_segments()[0]) == pytest.approx([point.cost.low, point.cost.high])
        assert marks.get_color() == looks(whole_speeds())[arm].colour
    (front,) = [line for line in axes.lines if len(line.get_xydata()) > 1]
    corners = [tuple(map(float, point)) for point in front.get_xydata()]
    for arm in ("linear", "streaming-16"):
        assert series(axes)[arm][0] in corners
    assert series(axes)["streaming-8"][0] not in corners
    assert {text.get_text() for text in axes.texts} >= {"linear", "streaming-16"}


def test_intervals_without_end_are_not_drawn() -> None:
    """Guards against a figure of few documents that fails, or whose axis is infinite."""
    figure = draw(quality_run(ARMS, documents=2), whole_speeds())["cost-against-speed"]
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert all(map(math.isfinite, (*axes.get_xlim(), *axes.get_ylim())))
    assert {container.has_yerr for container in axes.containers if container.get_label() == "ar-8"} == {False}


def test_what_a_run_lacks_is_told() -> None:
    """Guards against an empty figure, and a figure that is missing without a reason."""
    plain = {arm: ARMS[arm] for arm in ("full", "int8")}
    found = draw(dataclasses.replace(quality_run(plain), needles=[]), quality_speeds({"ar": SPEEDS["ar"]}))
    assert {name: why for name, why in found.items() if isinstance(why, str)} == {
        "ppl-by-cache": "no arm has a bounded cache",
        "needles": "no needle was looked for",
        "cost-against-speed": "no lossy arm is in both runs",
    }
    assert "--speed" in str(draw(quality_run(plain))["cost-against-speed"])
    assert draw(dataclasses.replace(quality_run(plain), documents=[]))["divergence"] == "no document was read"


# Appearance.


@pytest.mark.parametrize("count", [1, 3, 4])
def test_nothing_is_written_over_anything_else(count: int) -> None:
    """Guards against a legend inside the axes, and tiles or names that cover each other."""
    seekers = list(ARMS)[:count]
    sought = [
        dataclasses.replace(each, arm=arm)
        for arm in seekers
        for each in whole_quality_run().needles
        if each.arm == "full"
    ]
    figures = draw(dataclasses.replace(whole_quality_run(), needles=sought), whole_speeds())
    for name, figure in figures.items():
        assert isinstance(figure, Figure), figure
        assert round(figure.get_figwidth() * 25.4) in (85, 175)
        assert not unreadable(figure), name


def test_a_policy_has_one_colour_in_every_run() -> None:
    """Guards against colours that change when an arm is added."""
    few = {arm: ARMS[arm] for arm in ("random-8", "full", "heavy-hitter-8")}
    for arm, look in cache_looks(few).items():
        assert look.hue == cache_looks(ARMS)[arm].hue
    for arm, look in cache_looks(ARMS).items():
        policy = ARMS[arm].get("policy")
        assert look.hue == (PLAIN if policy is None else COLOURS[POLICIES[policy]])
        assert (look.line == ":") == ("control" in ARMS[arm])
    kinds = [(look.hue, look.colour, look.line) for look in cache_looks(ARMS).values()]
    assert len(set(kinds)) == len(ARMS)


def test_hostile_names_are_text_and_the_same_run_gives_the_same_bytes() -> None:
    """Guards against a name that is typeset as mathematics or breaks the drawing, and figures that differ each time."""
    arms = {"full": {}, **{name: WINDOW | {"cache": place} for place, name in enumerate(HOSTILE, 9)}}
    one, two = (draw(dataclasses.replace(quality_run(arms), needles=whole_quality_run().needles)) for _ in range(2))
    for name in ("ppl-by-cache", "divergence", "needles"):
        figures = [each for each in (one[name], two[name]) if isinstance(each, Figure)]
        assert len(figures) == 2
        files = [figure_bytes(figure, "pdf", HOSTILE[0]) for figure in figures]
        assert files[0] == files[1]
        assert not any(text.get_parse_math() for text in texts(figures[0]))


# The command.


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Write a quality run with its margins and a speed run into an empty folder."""
    monkeypatch.chdir(tmp_path)
    quality, speed = Path("quality.json"), Path("speed.json")
    quality.write_text(write(whole_quality_run()))
    speed.write_text(content(whole_speeds()))
    limits = Path("baselines", "quality", "t-prose.json")
    limits.parent.mkdir(parents=True)
    limits.write_text(json.dumps({"margins": {"sink-window-8": {"nll": 0.01}, "int8": {"nll": 0.5}}}))
    return quality, speed


@pytest.mark.parametrize("format_", FORMATS)
def test_a_report_tells_costs_speeds_and_margins(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    """Guards against a quality run read as a speed run, and against verdicts without a margin or by another run's."""
    quality, speed = files
    assert exit_code(monkeypatch, "report", quality, speed, "--speed", speed, "--format", format_, "--out", "out") == 0
    text = Path("out").read_text()
    text = Page(text).text if format_ == "html" else text.replace("$\\Delta$", "Δ")
    assert text.index("Quality of t in float32") < text.index("t with d, float32 on abacus")
    for told in (*ARMS, *SPEEDS, "FAIL", "PASS", "not measured: key-norm-8"):
        assert told in text
    cost = whole_quality_run().cost("sink-window-8", "nll")
    assert f"{cost:.4f}" in text
    assert "McNemar p" in text
    assert "2/3" in text
    assert f"{whole_speeds().speedup('streaming-8')}" in text
    assert "margin 0.01;" in text
    limits = Path("other.json")
    limits.write_text('{"margins": {"int8": {"kl": 0.25}}}')
    assert exit_code(monkeypatch, "report", quality, "--baseline", limits, "--format", format_, "--out", "out") == 0
    assert "margin 0.25;" in Path("out").read_text()
    assert "Quality against speed" not in Path("out").read_text()


def test_figures_are_written_and_those_that_are_missing_told(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against missing figures that are not reported, and runs that overwrite each other's figures."""
    quality, speed = files
    assert exit_code(monkeypatch, "report", quality, "--figures", "figures") == 0
    told = capsys.readouterr().out.splitlines()
    names = ["ppl-by-cache", "divergence", "needles"]
    assert told == [
        f"figures: as .pdf and .png {', '.join(names)}",
        "  no cost-against-speed: no run of speeds was given (--speed)",
    ]
    wanted = {f"{name}.{form}" for name in names for form in ("pdf", "png")}
    assert {path.name for path in Path("figures").iterdir()} == wanted
    assert exit_code(monkeypatch, "report", quality, speed, "--speed", speed, "--figures", "both") == 0
    assert Path("both", "quality", "cost-against-speed.pdf").exists()
    assert Path("both", "speed", "table1.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed.json", "--speed", "speed.json"], "--speed is of no use without a run of `pytest --quality`"),
        (["quality.json", "--speed", "other.json"], "give runs of the same target"),
        (["quality.json", "--speed", "quality.json"], "quality.json is no run of `pytest --benchmark`"),
        (["quality.json", "--baseline", "speed.json"], "speed.json has no margins"),
        (["cut.json"], "cut.json"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    """Guards against a traceback, and runs of different models that are compared."""
    Path("other.json").write_text(content(quality_speeds(SPEEDS, target="u")))
    Path("cut.json").write_text(files[0].read_text()[:300])
    assert exit_code(monkeypatch, "report", *arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_texts_of_quality_need_neither_torch_nor_matplotlib(files: tuple[Path, Path]) -> None:
    """Guards against seconds of imports, and a report that fails where PyTorch is not installed."""
    code = (
        "import sys; from specdecode import cli\n"
        "*command, formats = sys.argv\n"
        "for format_ in formats.split():\n"
        "    sys.argv = [*command, format_]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "    assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), format_\n"
    )
    options = ["report", str(files[0]), "--speed", str(files[1]), "--format", " ".join(FORMATS)]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_verdicts_that_are_not_as_they_have_to_be_come_first() -> None:
    """Guards against a broken margin reported only far down the page."""
    judgements = check_margins(whole_quality_run(), {"sink-window-8": {"nll": 0.01}, "int8": {"nll": 0.5}})
    page = markdown(whole_quality_run(), judgements)
    assert page.startswith(f"## {title(whole_quality_run())}")
    assert page.index("**sink-window-8** is FAIL") < page.index("| arm |")
    assert {row[0]: row[2] for row in margins(judgements).rows if row[1] == "ΔNLL" and row[2] != "not judged"} == {
        "sink-window-8": "FAIL",
        "int8": "PASS",
        "random-8": "FAIL, as expected",
        "no-sinks-8": "FAIL, as expected",
    }
