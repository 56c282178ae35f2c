"""Server arms by their concurrency: the table, its sentences, the charts, and the recommendations."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import judge
from specdecode.bench.measure.speed_session import JudgedRun
from specdecode.bench.report.advice import rich_advice
from specdecode.bench.report.captions import notes
from specdecode.bench.report.comment import comment
from specdecode.bench.report.contest import Recommendation
from specdecode.bench.report.drawing import in_print
from specdecode.bench.report.elements import document
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex
from specdecode.bench.report.load import by_concurrency, gains, losses
from specdecode.bench.report.markdown import markdown
from specdecode.bench.report.palette import places
from specdecode.bench.report.recommend import is_hopeless, recommend
from specdecode.bench.report.server_entry import server_entry
from specdecode.bench.report.tables import limits, speeds
from specdecode.bench.report.terminal import console_text
from specdecode.bench.runs.counts import Latencies
from specdecode.bench.runs.records import ArmRecord, RunFile
from specdecode.bench.summary import speed_text
from tests.helpers.pages import HOSTILE, MOST_LINES, Page
from tests.helpers.print_figures import figure_of, series, unreadable
from tests.helpers.speed_runs import MODEL, SPEEDUPS, read_back, speed_arm, speed_run, sweep

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLAIN, EAGLE = {"url": "http://127.0.0.1:1/v1"}, {"command": "serve {target} --draft {draft} --port {port}"}
NGRAM = {"command": "serve {target} --port {port}", "environment": {"A B": 'x"y'}, "prefix_cache": True}


def served(speed: float | list[float], server: dict[str, Any], number: int = 1, **of_all: Any) -> ArmRecord:
    """Return one server arm with the latencies of its requests, by the number of prompts that it decodes at a time."""
    options = {"server": server} | ({"concurrency": number} if number > 1 else {})
    record = speed_arm(speed, options, **of_all)
    requests = Latencies(ttft=[0.010 * number] * 9 + [0.5], tpot=[0.002 * number] * 9 + [0.07])
    return replace(record, rows={prompt: replace(row, latencies=requests) for prompt, row in record.rows.items()})


def loaded(**arms: ArmRecord) -> RunFile:
    """Return a run of servers at a concurrency of 1, 4 and 16: plain decoding, a draft that gains less and less, and
    more arms.
    """
    plain = {"ar": served(1.0, PLAIN), "ar_c4": served(3.0, PLAIN, 4), "ar_c16": served(8.0, PLAIN, 16)}
    eagle = {
        "eagle": served(2.0, EAGLE),
        "eagle_c4": served(3.9, EAGLE, 4, baseline="ar-c4"),
        "eagle_c16": served(6.0, EAGLE, 16, baseline="ar-c16"),
    }
    return speed_run(**plain | eagle | arms)


def curve(*speeds: float, numbers: tuple[int, ...] = (1, 4, 16)) -> list[str]:
    """Return the sentences on an arm with these speedups over plain decoding of the same concurrency."""
    plain = dict(zip((1, 4, 16), (1.0, 3.0, 8.0), strict=True))
    arms = {}
    for number, speed in zip(numbers, speeds, strict=True):
        name, baseline = ("x", None) if number == 1 else (f"x_c{number}", f"ar-c{number}")
        arms[name] = served(speed * plain[number], NGRAM, number, baseline=baseline)
    return [sentence for sentence in losses(loaded(**arms)) if sentence.startswith("x:")]


def test_each_arm_has_a_row_for_each_concurrency() -> None:
    """Guards against a speedup over another concurrency's baseline, a percentile in the median's column, and seconds
    shown as milliseconds.
    """
    run = loaded(lone=served(1.5, NGRAM))
    grid = by_concurrency(run)
    assert [column.name for column in grid.columns] == [
        *("arm", "concurrency", "tokens/s", "speedup over ar", "τ"),
        *("TTFT ms", "TTFT p95 ms", "TPOT ms", "TPOT p95 ms", "output"),
    ]
    rows = {(arm, number): values for arm, number, *values in grid.rows}
    assert list(rows) == [(arm, number) for arm in ("ar", "eagle") for number in ("1", "4", "16")]
    throughput, speedup, tau, *latencies = rows["eagle", "16"]
    assert float(throughput.split(" ")[0]) == pytest.approx(run.measures("eagle-c16").throughput, abs=0.1)
    assert speedup == f"{run.speedup('eagle-c16', over='ar-c16')} over ar-c16"
    assert speedup.startswith("0.75 [")
    assert rows["eagle", "1"][1] == f"{run.speedup('eagle')}"
    assert (tau, latencies) == ("2.00", ["160", "500", "32.0", "70.0", "equal"])


def test_families_are_of_one_name_and_one_server() -> None:
    """Guards against another server's row listed as the same arm's, and an arm of this package in the table."""
    arms = {"x": served(2.0, NGRAM), "x_c4": served(3.0, EAGLE, 4), "y": speed_arm(1.0, {"drafter": "lookup"})}
    assert {row[0] for row in by_concurrency(loaded(**arms)).rows} == {"ar", "eagle"}
    assert by_concurrency(speed_run(y=arms["y"])).rows == []


def test_percentiles_are_in_that_table_alone() -> None:
    """Guards against a table of speeds that is too wide for a screen."""
    grid = speeds(loaded())
    assert not [column.name for column in grid.columns if "p95" in column.name]
    rows = {row[0]: dict(zip((column.name for column in grid.columns), row, strict=True)) for row in grid.rows}
    assert rows["eagle-c4"]["speedup over ar"].endswith("] over ar-c4")
    assert rows["eagle"]["speedup over ar"].endswith("]")


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ((2.0, 1.3, 0.7), "loses from 16 prompts at a time on; gains at 1 and 4"),
        ((2.0, 1.3, 1.2), "gains at every concurrency that was measured"),
        ((2.0, 1.0, 0.7), "loses from 16 prompts at a time on; gains at 1; the runs can't tell at 4"),
        ((1.5, 1.3, 1.0), "gains at 1 and 4; the runs can't tell at 16"),
        ((1.5, 1.003, 0.997), "gains at 1; the runs can't tell at 4 and 16"),
        ((1.0, 1.0, 1.0), "the runs can't tell at 1, 4 and 16"),
        ((0.9, 0.8, 0.7), "loses from 1 prompt at a time on"),
        ((1.5, 0.8, 1.3), "loses at 4; gains at 1 and 16"),
        ((0.8, 1.0, 1.0), "loses at 1; the runs can't tell at 4 and 16"),
        ((0.8, 1.0, 0.7), "loses at 1 and 16; the runs can't tell at 4"),
    ],
)
def test_a_sentence_says_from_where_on_an_arm_loses(speedups: tuple[float, ...], said: str) -> None:
    """Guards against a loss that is only noise, and against one reported for a concurrency at which the arm gains."""
    assert curve(*speedups) == [f"x: {said}."]


@pytest.mark.parametrize("fault", [{"rows": {}, "bugs": 3}, {"bugs": 1}, {"failure": "its server died"}], ids=str)
def test_what_has_nothing_to_compare_with_is_not_told_to_gain(fault: dict[str, Any]) -> None:
    """Guards against a gain of batching that is credited to drafts, and against the use of void times."""
    run = loaded(x=served(2.0, NGRAM), x_c32=served(9.0, NGRAM, 32))
    assert losses(run)[1:] == ["x: gains at 1; nothing is known at 32."]
    slow = loaded(x=served(0.5, NGRAM), x_c32=served(9.0, NGRAM, 32))
    assert losses(slow)[1:] == ["x: loses at 1; nothing is known at 32."]
    wrong = replace(run, arms=run.arms | {"eagle-c4": replace(run.arms["eagle-c4"], **fault)})
    assert losses(wrong)[0] == "eagle: loses from 16 prompts at a time on; gains at 1; nothing is known at 4."
    assert "ar" not in gains(run)
    outputs = {row[-1] for row in by_concurrency(wrong).rows if row[:2] == ["eagle", "4"]}
    assert outputs == {"FAILED" if "failure" in fault else "WRONG"}


def test_every_report_has_the_table_and_the_sentence() -> None:
    """Guards against a finding that only one of the reports shows."""
    run, sentence = loaded(), "eagle: loses from 16 prompts at a time on; gains at 1 and 4."
    past = History([], "none")
    judged = JudgedRun("title", ["HumanEval"], run, {}, {}, "by", [])
    page = Page(document("title", section(run, "title", "by", [])))
    pages = {
        "markdown": markdown(run, "title", "by", [], past),
        "latex": latex(run, "title", "by", []).replace("\\%", "%"),
        "html": page.text,
        "terminal": " ".join(speed_text(judged, False, "utf-8").split()),
        "comment": comment(run, "title", "by", []),
    }
    for name, text in pages.items():
        assert sentence in text, name
        assert ("95th percentile" in text) == (name != "comment"), name
    assert "Speedup by concurrency" in page.drawings
    without = speed_run(lookup=speed_arm(1.5, {"drafter": "lookup"}))
    assert "concurrency" not in markdown(without, "title", "by", [], past)
    assert "concurrency" not in document("title", section(without, "title", "by", []))


def test_a_comment_has_room_for_any_number_of_families() -> None:
    """Guards against a comment that grows with each server."""
    many = {f"x{i}": served(2.0, NGRAM | {"model": str(i)}) for i in range(60)}
    many |= {f"x{i}_c4": served(2.0, NGRAM | {"model": str(i)}, 4, baseline="ar-c4") for i in range(60)}
    run = loaded(**many)
    text = comment(run, "title", "by", judge(run, run), file="run.json")
    assert text.count("\n") <= MOST_LINES
    assert "And 56 more." in text
    assert "x0: " in text
    assert "x9: " not in text


def test_the_baseline_is_told_to_be_a_servers() -> None:
    """Guards against a server's plain decoding that is labelled as this package's."""
    assert notes(loaded())[0].startswith("Reference arm: ar, which a server decodes. ")
    assert notes(speed_run())[0].startswith("Reference arm: ar, autoregressive decoding by this package. ")
    code = notes(speed_run(ar=speed_arm(1.0, {"call": "package:make"})))[0]
    assert code.startswith("Reference arm: ar, which code outside of this package decodes. ")


def test_several_prompts_at_a_time_are_no_gain_by_drafts() -> None:
    """Guards against a page that names plain decoding of many prompts as the fastest way, with bars too long to read
    the others.
    """
    run = loaded()
    page = Page(document("title", section(run, "title", "by", []))).text
    assert f"{run.speedup('eagle').value:.2f} times ar" in page
    (axes,) = figure_of(run, "methods").axes
    assert {bar.get_label() for bar in axes.containers} & run.arms.keys() == {"eagle", "eagle-c4", "eagle-c16"}


def test_arms_that_differ_in_concurrency_have_one_colour() -> None:
    """Guards against a line that changes its colour, and another kind of server with the same colour."""
    found = places(loaded(x=served(1.5, NGRAM)))
    assert {found[arm] for arm in ("ar", "ar-c4", "ar-c16")} == {None}
    assert found["eagle"] == found["eagle-c16"] not in (None, found["x"])


def test_the_page_draws_each_speedup_with_its_interval() -> None:
    """Guards against a curve with other numbers than the table, and a chart that fails without measurements."""
    run = loaded()
    (chart,) = charts(run)
    said = str(chart.findtext("desc"))
    assert said == "; ".join(f"eagle at {n}: {speedup}" for n, speedup in gains(run)["eagle"].items())
    xs = [float(circle.get("cx", "")) for circle in chart.iter("circle")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert len([mark for mark in chart.iter("line") if mark.get("class") == "one"]) == 1
    arms = {arm: replace(record, rows={}, bugs=1) if "eagle" in arm else record for arm, record in run.arms.items()}
    (empty,) = charts(replace(run, arms=arms))
    assert empty.findtext("desc") == "none is known"


def charts(run: RunFile) -> list[Any]:
    return [
        chart
        for part in section(run, "title", "by", [])
        for chart in part.iter("svg")
        if chart.findtext("title") == "Speedup by concurrency"
    ]


def test_the_figure_has_a_line_for_each_arm() -> None:
    """Guards against a point at another concurrency, names over each other, and missing intervals."""
    run = loaded(x=served(1.5, NGRAM), x_c4=served(4.0, NGRAM, 4, baseline="ar-c4"))
    figure = figure_of(run, "speedup-by-concurrency")
    (axes,) = figure.axes
    found = series(axes)
    for name, speedups in gains(run).items():
        across, up = zip(*found[name], strict=True)
        assert across == pytest.approx(list(speedups), rel=0.05)
        assert up == tuple(speedup.value for speedup in speedups.values())
        (bars,) = [container for container in axes.containers if container.get_label() == name]
        ends = [(low, high) for (_, low), (_, high) in bars[2][0].get_segments()]
        assert ends == [pytest.approx((speedup.low, speedup.high)) for speedup in speedups.values()]
    with in_print():
        figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    assert axes.get_xscale() == "log"
    assert not unreadable(figure)


def test_names_of_servers_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a name that injects elements into the page, or breaks the drawing."""
    arms: dict[str, dict[str, Any]] = {"ar": {"server": PLAIN}, "ar-c4": {"server": PLAIN, "concurrency": 4}}
    for name in HOSTILE:
        monkeypatch.setitem(SPEEDUPS, name, 1.5)
        arms |= {name: {"server": EAGLE}, f"{name}-c4": {"server": EAGLE, "concurrency": 4}}
    run = sweep(arms)
    page = Page(document("title", section(run, "title", "by", [])))
    assert not {"script", "img"} & set(page.tags)
    assert len(gains(run)) == len(HOSTILE)
    assert "<script" not in markdown(run, "title", "by", [], History([], "none"))
    assert figure_of(run, "speedup-by-concurrency").axes


# The limits of the speedup.


def test_a_step_that_nobody_took_apart_is_one_factor() -> None:
    """Guards against a table that fails where the parts of a step are not timed, and a factor in another's column."""
    arms = {"ar": {}, "linear": MODEL | {"k": 2}, "called": MODEL | {"k": 2}}
    run = sweep(arms)
    assert [column.name for column in limits(run).columns][1:] == [
        *("acceptance length", "drafting", "verifying", "overhead", "all")
    ]
    called = run.arms["called"]
    rows = {
        prompt: replace(row, seconds=replace(row.seconds, draft=None, verify=None, overhead=None))
        for prompt, row in called.rows.items()
    }
    both = replace(run, arms=run.arms | {"called": replace(called, rows=rows)})
    names, *_ = zip(*[(column.name,) for column in limits(both).columns], strict=True)
    found = {row[0]: dict(zip(names, row, strict=True)) for row in limits(both).rows}
    assert names[1:] == ("acceptance length", "drafting", "verifying", "overhead", "time a step", "all")
    assert [name for name, value in found["called"].items() if not value] == ["drafting", "verifying", "overhead"]
    assert [name for name, value in found["linear"].items() if not value] == ["time a step"]
    whole = float(found["called"]["acceptance length"]) * float(found["called"]["time a step"])
    assert whole == pytest.approx(float(found["called"]["all"]), abs=0.02)
    alone = limits(replace(both, arms={arm: both.arms[arm] for arm in ("ar", "called")}))
    assert [column.name for column in alone.columns][1:] == ["acceptance length", "time a step", "all"]


def test_a_server_that_tells_its_proposals_has_its_limits() -> None:
    """Guards against servers that are left out, and plain decoding that is said to be limited by drafts."""
    run = loaded()
    rows = {p: replace(row, counts=replace(row.counts, drafted=60)) for p, row in run.arms["eagle"].rows.items()}
    run = replace(run, arms=run.arms | {"eagle": replace(run.arms["eagle"], rows=rows)})
    assert [row[0] for row in limits(run).rows] == ["eagle"]


# Recommendations.


def at(run: RunFile, number: int, more: str = "") -> Recommendation:
    aim = f"highest throughput of servers, {number} prompt{'s' if number > 1 else ''} at a time{more}"
    (found,) = (each for each in recommend(run).recommendations if each.aim == aim)
    return found


def test_the_fastest_server_is_recommended_at_each_concurrency() -> None:
    """Guards against an arm that is compared with another concurrency's baseline, or recommended where it loses."""
    run = loaded()
    assert [each.arm for each in recommend(run).recommendations] == ["eagle", "eagle-c4", "ar-c16"]
    four, sixteen = at(run, 4), at(run, 16)
    assert four.over.keys() == four.beats.keys() == {"ar-c4"}
    assert four.over["ar-c4"].value == pytest.approx(1.3, rel=0.02)
    assert four.reason.startswith("Faster than ar-c4 beyond the noise")
    assert sixteen.reason.startswith("Nothing is faster than plain decoding beyond the noise.")
    assert sixteen.beats.keys() == {"eagle-c16"}


def test_a_server_is_not_recommended_for_noise_or_wrong_outputs() -> None:
    """Guards against recommending a gain within the noise, or an arm with void times."""
    run = loaded(
        eagle=served(1.001, EAGLE), x=served(3.0, NGRAM, bugs=1), y=served(3.0, {"url": "http://a"}, prompts=1)
    )
    advice = recommend(run)
    assert at(run, 1).arm == "ar"
    assert at(run, 1).tied.keys() == {"eagle"}
    assert advice.left_out["x"] == "1 wrong output(s)"
    assert advice.left_out["y"].startswith("1 prompt(s) are too few")


def test_a_server_is_given_up_for_wrong_outputs_alone() -> None:
    """Guards against dropping an arm that loses at one concurrency and would gain at another."""
    run = loaded(x=served(0.5, NGRAM), y=served(0.5, NGRAM | {"model": "y"}, bugs=1))
    assert not is_hopeless(run, "x")
    assert is_hopeless(run, "y")


def test_without_plain_decoding_at_a_concurrency_the_fastest_is_recommended() -> None:
    """Guards against a comparison with plain decoding of a single prompt."""
    found = at(loaded(x_c32=served(9.0, NGRAM, 32)), 32)
    assert (found.arm, found.over) == ("x-c32", {})
    assert "plain decoding was not measured at this concurrency" in found.reason


def test_a_server_that_may_write_another_text_is_told_apart() -> None:
    """Guards against recommending a lossy server without saying so."""
    run = loaded(x=replace(served(3.0, NGRAM), lossy=True))
    assert at(run, 1).arm == "eagle"
    lossy = at(run, 1, ", if loss is acceptable")
    assert lossy.arm == "x"
    assert "may write a different text" in lossy.reason


def test_arms_of_this_package_and_of_servers_are_recommended_apart() -> None:
    """Guards against recommending a server instead of an arm of this package, and the other way round."""
    lookup = speed_arm(1.5, {"drafter": "lookup"})
    served_arms = {"base": served(2.0, PLAIN), "x": served(4.0, EAGLE, baseline="base")}
    run = speed_run(lookup=lookup, **served_arms)
    advice = recommend(run)
    assert advice.recommendations[0].arm == "lookup"
    assert advice.recommendations[0].beats.keys() == {"ar"}
    assert at(run, 1).arm == "x"
    assert at(run, 1).over["base"].value == pytest.approx(2.0, rel=0.02)
    assert "a server decodes ar" in recommend(loaded(lookup=lookup)).left_out["lookup"]


def test_a_run_of_servers_needs_no_arm_of_a_fixed_name() -> None:
    """Guards against advice that depends on the baseline's name."""
    run = loaded()
    arms = {f"vllm{arm[2:]}" if arm.startswith("ar") else arm: record for arm, record in run.arms.items()}
    arms = {
        arm: replace(record, baseline=(record.baseline or "").replace("ar", "vllm") or None)
        for arm, record in arms.items()
    }
    renamed = read_back(replace(run, header=replace(run.header, baseline="vllm"), arms=arms, path=Path()))
    assert [each.arm for each in recommend(renamed).recommendations] == ["eagle", "eagle-c4", "vllm-c16"]


def test_the_entry_of_a_server_can_be_put_into_a_preset() -> None:
    """Guards against Python code offered for a server, which cannot decode as it does, and an entry that reads back
    differently.
    """
    run = loaded()
    code = at(run, 4).code
    assert "specdecode.generate" not in code
    assert '# {target} stands for "t"\n# {draft} stands for "d"' in code
    assert tomllib.loads(code) == {"arms": {"eagle-c4": {"server": EAGLE, "concurrency": 4}}}
    assert ArmSpec.from_entry("eagle-c4", tomllib.loads(code)["arms"]["eagle-c4"]).concurrency == 4
    text = console_text(lambda console: console.print(rich_advice(run, recommend(run))), False, "utf-8")
    assert code in text
    assert "over ar-c4" in text
    assert "τ: tokens of output per step, the mean. " in " ".join(text.split())


@pytest.mark.parametrize("name", [*HOSTILE, "\x7f\x00'\u2028", "."])
def test_hostile_entries_are_values(name: str) -> None:
    """Guards against a file whose entry injects its own keys, or breaks the TOML."""
    server = {"command": f"{name} {{target}}", "environment": {name: name}, "start_minutes": 1e-7, "alone": False}
    options = {"server": server, "requests": 8, "limit_s": 2.5, "list": [1, name]}
    run = speed_run(identity=("abacus", name, "", "float32"), x=speed_arm(1.0, options))
    arms = {name: replace(run.arms["x"], options=options | {"unset": None, "baseline": "b"})}
    assert tomllib.loads(server_entry(replace(run, arms=arms), name)) == {
        "arms": {name: json.loads(json.dumps(options))}
    }
