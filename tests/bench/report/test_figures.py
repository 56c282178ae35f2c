"""Figures for print: `specdecode report RUN --figures DIR`, opened and read back."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from specdecode.bench.report.drawing import figure_bytes, looks
from specdecode.bench.report.figures import FIGURES, draw
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex_table_1
from specdecode.bench.report.palette import COLOURS, METHODS, PLAIN
from specdecode.bench.report.speedup_model import modelled
from specdecode.bench.runs.counts import as_dict
from tests.helpers.command_line import exit_code
from tests.helpers.print_figures import figure_of, series, texts, unreadable
from tests.helpers.speed_runs import (
    ARMS,
    LENGTHS,
    MODEL,
    PROMPTS,
    SPEEDUPS,
    WINDOW,
    content,
    sweep,
    whole_sweep,
)


@cache
def drawn() -> dict[str, Figure | str]:
    return draw(whole_sweep())


def panels(name: str) -> list[Axes]:
    figure = drawn()[name]
    assert isinstance(figure, Figure), figure
    return figure.axes


def titles(name: str) -> list[str]:
    return [axes.get_title() for axes in panels(name)]


def legend(name: str) -> list[str]:
    figure = drawn()[name]
    assert isinstance(figure, Figure)
    return [text.get_text() for legend_ in figure.legends for text in legend_.get_texts()]


# The content of each figure.


def test_memory_is_drawn_by_length_for_each_cache() -> None:
    """Guards against bytes of another length, and against a bounded cache with the line of the full one."""
    (axes,) = panels("memory-by-length")
    assert series(axes) == {
        "full cache": [(10, 10), (20, 20), (40, 40)],
        "sink-window, cache 64": [(10, 8), (20, 8), (40, 8)],
        "sink-window, cache 128": [(10, 10), (20, 16), (40, 16)],
    }
    assert axes.get_ylabel() == "peak KV, MB"
    ends = [text.get_text() for text in axes.texts]
    assert "full cache\n(ar, linear and 2 more)" in ends
    assert "sink-window, cache 64\n(ar, linear)" in ends


def test_the_comprehensive_chart_has_a_panel_for_each_length_and_measure() -> None:
    """Guards against a cache in another's place, a measure in another's unit, and a missing standard deviation."""
    axes = panels("comprehensive")
    assert titles("comprehensive")[:3] == ["10 tokens", "20 tokens", "40 tokens"]
    assert [of.get_ylabel() for of in axes[::3]] == ["tokens/s", "TTFT, ms", "TPOT, ms", "accepted, %", "KV, MB"]
    assert [label.get_text() for label in axes[-1].get_xticklabels()] == ["64", "128", "all"]
    order = ["streaming-k4-64", "streaming-k4-128", "linear-k4"]
    units = {"throughput": 1, "ttft_s": 1e3, "tpot_s": 1e3, "acceptance_rate": 100, "peak_cache_bytes": 1e-6}
    for place, (name, unit) in enumerate(units.items()):
        for column, length in enumerate(LENGTHS):
            found = series(axes[3 * place + column])
            assert found.keys() == ({"linear-k4"} if name == "acceptance_rate" else {"ar", "linear-k4"})
            x, y = zip(*found["linear-k4"], strict=True)
            assert [round(at) for at in x] == [0, 1, 2]
            part = whole_sweep().at(length)
            assert y == pytest.approx([unit * as_dict(part.measures(arm))[name] for arm in order])
    (bars,) = [of for of in axes[2].containers if of.get_label() == "linear-k4"]
    spread = [abs(high - low) / 2 for (_, low), (_, high) in bars[2][0].get_segments()]
    assert spread == pytest.approx([whole_sweep().measures(arm).throughput_std for arm in order])
    assert legend("comprehensive") == ["ar", "linear-k4"]


def test_every_method_has_its_bar_with_interval_and_floor() -> None:
    """Guards against a bar without its uncertainty, a peer that looks like our arm, and a slowdown that looks like a
    speedup.
    """
    (axes,) = panels("methods")
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = {bar.get_label(): bar for bar in axes.containers if bar.get_label() in ARMS}
    assert len(names) == len(bars) == len(ARMS) - 1
    for arm, (patch,) in bars.items():
        assert patch.get_width() == pytest.approx(whole_sweep().speedup(arm).value)
        assert bool(patch.get_hatch()) == arm.startswith("hf")
        place = round(patch.get_y() + patch.get_height() / 2)
        assert names[place].startswith(arm)
    assert "replayed (synthetic)" in names
    assert {"ar-64, lossy, loops", "ar-128, lossy"} <= set(names)
    assert [bars[name.split(",")[0].split(" ")[0]][0].get_width() for name in names] == sorted(
        patch.get_width() for (patch,) in bars.values()
    )
    ends = [x for line in axes.collections for segment in line.get_segments() for x, _ in segment]
    assert sorted(ends) == pytest.approx(
        sorted(end for of in map(whole_sweep().speedup, bars) for end in (of.low, of.high))
    )
    (band,) = [patch for patch in axes.patches if patch.get_label() == "A/A floor"]
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((math.exp(-0.03), math.exp(0.03)))


@pytest.mark.parametrize(
    ("fault", "word"),
    [({"rows": {}, "shorter": {}, "bugs": 3}, "WRONG"), ({"bugs": 1}, "WRONG"), ({"failure": "it died"}, "FAILED")],
    ids=str,
)
def test_void_times_are_named_and_not_drawn(fault: dict[str, Any], word: str) -> None:
    """Guards against a wrong output that is drawn as a fast one, or that is left out silently."""
    arms = whole_sweep().arms | {"linear-k4": dataclasses.replace(whole_sweep().arms["linear-k4"], **fault)}
    run = dataclasses.replace(whole_sweep(), arms=arms)
    figures = {name: figure_of(run, name) for name in ("methods", "by-task", "quality-against-speed", "comprehensive")}
    for name, figure in figures.items():
        artists = [artist for axes in figure.axes for artist in (*axes.lines, *axes.containers)]
        assert "linear-k4" not in {artist.get_label() for artist in artists}, name
    for name in ("methods", "by-task"):
        assert f"linear-k4, {word}" in {label.get_text() for label in figures[name].axes[0].get_yticklabels()}
    assert f"{word}: linear-k4" in {text.get_text() for text in texts(figures["quality-against-speed"])}
    assert "no chain arms differ only in K" in str(FIGURES["speedup-by-k"](run))
    assert not unreadable(figures["by-task"])


def test_speedup_by_k_has_the_measurement_and_both_models() -> None:
    """Guards against a curve through other points than the table's, or a family whose arms differ in more than K."""
    ((name, rows),) = modelled(whole_sweep()).items()
    (axes,) = panels("speedup-by-k")
    assert axes.get_title() == name == "linear"
    found = series(axes)
    assert found["measured"] == [
        (2, whole_sweep().speedup("linear-k2").value),
        (4, whole_sweep().speedup("linear-k4").value),
    ]
    assert found["study"] == [(of.k, of.study) for of in rows]
    assert found["exact"] == [(of.k, of.exact) for of in rows]
    (bars,) = axes.containers
    ends = [(low, high) for (_, low), (_, high) in bars[2][0].get_segments()]
    assert ends == [(of.measured.low, of.measured.high) for of in rows]


def test_evictions_are_drawn_by_cache_for_each_length() -> None:
    """Guards against each length with the evictions of the full length, and caches that are not ordered by size."""
    (axes,) = panels("compressions-by-cache")
    assert series(axes) == {"10": [(0, 1), (1, 0)], "20": [(0, 2), (1, 1)], "40": [(0, 5), (1, 2)]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128"]
    assert axes.get_title() == "sink-window"
    assert legend("compressions-by-cache") == [f"{length} tokens of output" for length in LENGTHS]


def test_every_draft_has_its_line_of_acceptance() -> None:
    """Guards against a position that is off by one, and lines of different caches in one panel."""
    found = dict(zip(titles("acceptance-by-position"), map(series, panels("acceptance-by-position")), strict=True))
    assert {title: set(lines) for title, lines in found.items()} == {
        "unchanged target": {"linear-k2", "linear-k4", "tree", "lookup"},
        "sink-window, cache 64": {"streaming-k4-64"},
        "sink-window, cache 128": {"streaming-k4-128"},
        "int8": {"lookup-int8"},
        "replay 0.8": {"replayed"},
    }
    shares = whole_sweep().arms["linear-k4"].acceptance_by_position()
    line = found["unchanged target"]["linear-k4"]
    assert [at for at, _ in line] == [1, 2, 3, 4]
    assert [share for _, share in line] == pytest.approx([100 * share for share in shares])
    # Arms that draft alike under another cache appear once.
    assert sorted(legend("acceptance-by-position")) == [
        "linear-k2",
        "linear-k4",
        "lookup",
        "replayed (synthetic)",
        "tree",
    ]


def test_what_loops_is_hollow_and_the_front_is_what_nothing_beats() -> None:
    """Guards against a loop that looks like a result, and a front through points that others beat in both measures."""
    (axes,) = panels("quality-against-speed")
    marks = {str(line.get_label()): line for line in axes.lines}
    for arm in ARMS:
        ((speed, share),) = marks[arm].get_xydata()
        measures = whole_sweep().measures(arm)
        assert (speed, share) == pytest.approx((measures.speedup, 100 * measures.agreement))
        assert (marks[arm].get_fillstyle() == "none") == (arm == "ar-64")
    assert "hollow: text loops" in legend("quality-against-speed")
    assert axes.get_ylabel() == "tokens before the output differs from ar's, %"
    arms = {arm: of for arm, of in ARMS.items() if arm not in ("replayed", "ar-64")}
    figure = figure_of(sweep(arms), "quality-against-speed")
    fastest = [sweep(arms).speedup(arm).value for arm in ("linear-k4", "streaming-k4-128", "streaming-k4-64")]
    corners = [
        (fastest[0], 100),
        (fastest[0], 50),
        (fastest[1], 50),
        (fastest[1], 25),
        (fastest[2], 25),
        (fastest[2], 0),
    ]
    (front,) = [line for line in figure.axes[0].lines if len(line.get_xydata()) > 1]
    path = [tuple(map(float, point)) for point in front.get_xydata()]
    assert path[-len(corners) :] == [pytest.approx(corner) for corner in corners]
    assert path[0][1] == 100


def test_the_reference_arm_is_named_as_it_is() -> None:
    """Guards against shares of tokens that are read as those before an output differs from another arm's."""
    renamed = sweep(ARMS, baseline="hf-generate")
    other = whole_sweep().arms | {"lookup-int8": dataclasses.replace(whole_sweep().arms["lookup-int8"], baseline="ar")}
    mixed = dataclasses.replace(renamed, arms=other)
    for run, name in ((renamed, "hf-generate"), (mixed, "its reference arm")):
        (axes,) = figure_of(run, "quality-against-speed").axes
        assert axes.get_ylabel() == f"tokens before the output differs from {name}'s, %"
        assert axes.get_xlabel() == f"speedup over {name}"
    plain = sweep({arm: ARMS[arm] for arm in ("ar", "hf-generate")}, baseline="hf-generate")
    assert FIGURES["quality-against-speed"](plain) == "no lossy arm was compared with hf-generate's output"
    assert FIGURES["by-task"](sweep({"ar": ARMS["ar"]})) == "no arm except ar has a time"


def test_long_names_of_tasks_stay_above_their_own_panel() -> None:
    """Guards against titles that run into each other, or beyond the page."""
    tasks = ("math_reasoning", "qa", "summarization", "translation", "extraction", "math_reasoning-2")
    prompts = tuple(f"spec-bench/{task}/1" for task in tasks)
    arms = {"ar": {}, "an-arm-with-a-long-name": {"drafter": "lookup"}}
    figure = figure_of(sweep(arms, prompts), "by-task")
    figure.draw_without_rendering()
    page = figure.bbox
    spans = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(page.x0 <= span.x0 and span.x1 <= page.x1 for span in spans)
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(spans))
    assert figure.axes[1].get_title() == "spec-bench/qa, 1 prompt"


def test_tasks_have_their_own_speedups() -> None:
    """Guards against a task's panel with the mean of all tasks, or an arm on another's line."""
    assert titles("by-task") == ["text, 2 prompts", "prose, 1 prompt"]
    names = [label.get_text() for label in panels("by-task")[0].get_yticklabels()]
    for axes, prompts in zip(panels("by-task"), whole_sweep().tasks.values(), strict=True):
        found = series(axes)
        for arm in ARMS:
            if arm != "ar":
                ((speedup, place),) = found[arm]
                assert speedup == pytest.approx(whole_sweep().with_prompts(prompts).speedup(arm).value)
                assert names[round(place)].startswith(arm)


def test_what_a_run_lacks_is_told() -> None:
    """Guards against an empty figure, and a figure that is missing without a reason."""
    older = {arm: dataclasses.replace(record, options={}, shorter={}) for arm, record in whole_sweep().arms.items()}
    found = draw(dataclasses.replace(whole_sweep(), arms=older))
    assert "without the settings of its arms" in str(found["speedup-by-k"])
    assert {name for name, figure in found.items() if isinstance(figure, Figure)} == {
        *("methods", "acceptance-by-position", "quality-against-speed", "by-task")
    }
    alone = draw(sweep({"ar": ARMS["ar"]}, ("text/0",)))
    assert {name: figure for name, figure in alone.items() if isinstance(figure, str)} == {
        "comprehensive": "no arms differ only in their cache",
        "methods": "no arm except ar has a time",
        "speedup-by-k": "no chain arms differ only in K",
        "speedup-by-concurrency": "no drafting arms of servers differ only in concurrency",
        "compressions-by-cache": "no arms differ in the size of a bounded cache",
        "acceptance-by-position": "no arm is known to have drafted 10 times",
        "quality-against-speed": "no lossy arm was compared with ar's output",
        "by-task": "the run has only one task",
    }


# Appearance.


CLOSE = {
    **{arm: ARMS[arm] for arm in ("ar", "linear-k2", "hf-generate", "hf-assisted")},
    **{f"ar-{cache_}": WINDOW | {"cache": cache_} for cache_ in (116, 120, 124, 128)},
    "a-name-as-long-as-there-is-room-for": {"drafter": "lookup"},
}


@pytest.mark.parametrize("arms", [ARMS, CLOSE], ids=["many", "close"])
def test_nothing_is_written_over_anything_else(
    arms: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a legend inside the axes, lines whose names end together, and names that are covered or cut."""
    monkeypatch.setitem(SPEEDUPS, "a-name-as-long-as-there-is-room-for", 2.5)
    for name, figure in (drawn() if arms is ARMS else draw(sweep(arms))).items():
        if isinstance(figure, str):
            continue
        assert not unreadable(figure), name
        assert len(texts(figure)) > 10


def test_figures_are_as_wide_as_a_column_or_a_page() -> None:
    """Guards against letters that shrink or grow because the paper has to scale the figure."""
    widths = Counter(round(figure.get_figwidth() * 25.4) for figure in drawn().values() if isinstance(figure, Figure))
    assert set(widths) == {85, 175}


def test_a_method_has_one_look_in_every_run() -> None:
    """Guards against colours that change when an arm is added."""
    alone = looks(sweep({arm: ARMS[arm] for arm in ("lookup", "ar", "hf-assisted", "linear-k4")}))
    for arm, look in alone.items():
        assert look == looks(whole_sweep())[arm]
    assert {look.hue for arm, look in alone.items() if arm != "ar"} == {
        COLOURS[METHODS["linear"]],
        COLOURS[METHODS["lookup"]],
    }
    for name in ("methods", "by-task", "quality-against-speed"):
        for axes in panels(name):
            for line in axes.lines:
                if (arm := str(line.get_label())) in ARMS:
                    assert to_hex(line.get_color()) == looks(whole_sweep())[arm].colour
    bars = {bar.get_label(): to_hex(bar[0].get_edgecolor()) for bar in panels("methods")[0].containers if len(bar) == 1}
    assert bars == {arm: looks(whole_sweep())[arm].colour for arm in ARMS if arm != "ar"}


def test_cascades_of_the_same_drafters_have_one_look() -> None:
    """Guards against different colours for arms that differ only in K, and one colour for cascades of different
    drafters.
    """
    arms = {"ar": {}, "head": {"drafter": "head"}, "other": {"drafter": "lookup+model"}}
    cascades = {f"cascade-k{k}": {"drafter": "lookup+head", "k": k} for k in (2, 4)}
    found = looks(sweep(arms | cascades))
    assert found["cascade-k2"].hue == found["cascade-k4"].hue
    assert len({look.hue for look in found.values()}) == 4


def test_methods_and_variants_can_be_told_apart_without_colour() -> None:
    """Guards against figures that are useless in grey, and a bounded cache or a peer that looks like other arms."""
    shapes = {arm: (look.mark, look.fill, look.line) for arm, look in looks(whole_sweep()).items()}
    different = [
        "ar",
        "linear-k4",
        "tree",
        "lookup",
        "linear-cost-aware",
        "streaming-k4-64",
        "hf-assisted",
        "hf-generate",
    ]
    assert len({shapes[arm] for arm in [*different, "lookup-int8"]}) == len(different) + 1
    assert shapes["linear-k2"] == shapes["linear-k4"]
    assert shapes["streaming-k4-64"] == shapes["streaming-k4-128"]


def test_older_files_go_by_names_and_the_page_has_the_same_colours() -> None:
    """Guards against a method whose colour differs between the page and the figures, or with the age of the file."""
    older = {arm: dataclasses.replace(record, options={}) for arm, record in whole_sweep().arms.items()}
    hues = {arm: look.hue for arm, look in looks(dataclasses.replace(whole_sweep(), arms=older)).items()}
    known = [arm for arm in ARMS if arm not in ("tree", "replayed")]
    assert {arm: hues[arm] for arm in known} == {arm: looks(whole_sweep())[arm].hue for arm in known}
    assert hues["tree"] != hues["replayed"]
    assert not {hues["tree"], hues["replayed"]} & {hues[arm] for arm in known}
    style = files("specdecode.bench.report").joinpath("page.css").read_text().partition("@media")[0]
    assert re.findall(r"--c\d: (#\w+)", style) == list(COLOURS)
    assert f"--plain: {PLAIN}" in style
    page = section(whole_sweep(), "title", "", [])
    classes = {
        svg.findtext("title"): svg.get("class")
        for part in page
        for svg in part.iter("svg")
        if svg.get("class") != "plain"
    }
    for arm, look in looks(whole_sweep()).items():
        if look.hue != PLAIN:
            assert classes[f"Speedup of {arm} over ar"] == f"c{COLOURS.index(look.hue)}"


HOSTILE = {"$\\frac{1}{0}$": 3.0, "a_b^{c}\\d$": 6.0, "two\nlines": 9.0, "中文": 12.0, "x" * 200: 20.0}


def test_hostile_names_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a name that is typeset as mathematics, breaks the drawing, or fills the whole page."""
    for name, speedup in HOSTILE.items():
        monkeypatch.setitem(SPEEDUPS, name, speedup)
    few = {arm: ARMS[arm] for arm in ("ar", "ar-64", "ar-128", "linear-k4", "streaming-k4-64")}
    prompts = (*PROMPTS, *(f"{name}/0" for name in HOSTILE))
    served = {"served$": {"server": {}}, "served$-c4": {"server": {}, "concurrency": 4}}
    figures = draw(sweep(few | served | {name: MODEL | {"k": k} for k, name in enumerate(HOSTILE, 5)}, prompts))
    for name, figure in figures.items():
        assert isinstance(figure, Figure), figure
        seen = {text.get_text() for text in texts(figure)}
        assert not any(text.get_parse_math() for text in texts(figure))
        if name in ("methods", "by-task", "acceptance-by-position", "quality-against-speed"):
            assert {"$\\frac{1}{0}$", "a_b^{c}\\d$", "two lines", "中文", "x" * 35 + "…"} <= seen, name
        if name in ("methods", "by-task"):
            assert figure_bytes(figure, "pdf", "".join(HOSTILE)).startswith(b"%PDF")


def test_the_same_run_gives_the_same_bytes() -> None:
    """Guards against figures that differ in every commit through dates or the order of a set."""
    few = {arm: ARMS[arm] for arm in ("ar", "linear-k4", "streaming-k4-64", "hf-generate")}
    for name, form in (("quality-against-speed", "pdf"), ("methods", "pdf"), ("methods", "png")):
        files_ = [figure_bytes(figure_of(sweep(few), name), form, "title") for _ in range(2)]
        assert files_[0] == files_[1]
        assert b"Date" not in files_[0]


# The command.


def test_the_command_says_what_it_drew_and_why_not_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against missing figures that are not reported, and runs that overwrite each other's figures."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(content(sweep({arm: ARMS[arm] for arm in ("ar", "linear-k2", "linear-k4")}, ("text/0",))))
    two.write_text(content(sweep({"ar": {}}, ("text/0",))))
    folder = tmp_path / "figures"
    assert exit_code(monkeypatch, "report", one, "--figures", folder) == 0
    told = capsys.readouterr().out.splitlines()
    names = ["memory-by-length", "methods", "speedup-by-k", "acceptance-by-position"]
    assert told[0] == f"{folder}: table1.tex; as .pdf and .png {', '.join(names)}"
    files_ = {f"{name}.{form}" for name in names for form in ("pdf", "png")}
    assert {path.name for path in folder.iterdir()} == {"table1.tex", *files_}
    assert told[1] == "  no comprehensive: no arms differ only in their cache"
    assert len(told) == 1 + 5
    one.write_text(two.read_text())
    assert exit_code(monkeypatch, "report", one, two, "--figures", folder / "both", "--out", tmp_path / "text.md") == 0
    assert [len(list((folder / "both" / name).iterdir())) for name in ("one", "two")] == [3, 3]
    assert "## t with d" in (tmp_path / "text.md").read_text()
    two.write_text("no run")
    assert exit_code(monkeypatch, "report", two, one, "--figures", folder / "one") == 2
    assert [path.name for path in (folder / "one").iterdir()] == ["one"]


def test_what_is_wrong_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a traceback where matplotlib is missing or the folder is a file, and against runs that share a
    folder.
    """
    file, other = tmp_path / "run.json", tmp_path / "other" / "run.json"
    other.parent.mkdir()
    for path in (file, other):
        path.write_text(content(sweep({"ar": {}}, ("text/0",))))
    for arguments, said in (
        ([file, "--figures", file / "figures"], "run.json"),
        ([file, other, "--figures", tmp_path / "figures"], "several runs are named 'run'"),
    ):
        assert exit_code(monkeypatch, "report", *arguments) == 2
        assert said in (told := capsys.readouterr().err)
        assert told.count("\n") == 1
    monkeypatch.delitem(sys.modules, "specdecode.bench.report.figures")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert exit_code(monkeypatch, "report", file, "--figures", tmp_path / "figures") == 2
    told = capsys.readouterr().err
    assert "figures need matplotlib" in told
    assert "specdecode[figures]" in told
    assert told.count("\n") == 1


def test_table_1_has_every_method() -> None:
    """Guards against a method that the table leaves out, and a speed without its spread."""
    table = latex_table_1(whole_sweep())
    rows = {line.split(" & ")[0]: line for line in table.splitlines() if " & " in line}
    assert rows.keys() == {"method", "replayed (synthetic)", *ARMS} - {"replayed"}
    measures, speedup = whole_sweep().measures("linear-k4"), whole_sweep().speedup("linear-k4")
    throughput = f"{measures.throughput:.1f} ± {measures.throughput_std:.1f}"
    assert rows["linear-k4"].startswith(f"linear-k4 & {throughput} & {speedup} & ")
    assert rows["method"].count("&") == rows["linear-k4"].count("&") == 8
    for arm, output in (("linear-k4", "equal"), ("ar-128", "lossy 50\\%"), ("ar-64", "lossy 25\\% loops")):
        assert rows[arm].endswith(f" & {output} \\\\")
    wrong = {"linear-k4": dataclasses.replace(whole_sweep().arms["linear-k4"], bugs=1)}
    assert " & WRONG \\\\" in latex_table_1(dataclasses.replace(whole_sweep(), arms=whole_sweep().arms | wrong))
