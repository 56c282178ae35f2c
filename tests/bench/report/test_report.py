"""The report: `specdecode report RUN`, from files of fixed content."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from specdecode.bench.gate.history import history
from specdecode.bench.report.captions import notes
from specdecode.bench.runs.file import read
from tests.helpers.browser import CHROMIUM, look_at
from tests.helpers.command_line import exit_code
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.root import ROOT
from tests.helpers.run_contents import IDENTITY, SPEEDUPS, run_content
from tests.helpers.speed_runs import speed_arm, speed_run

FORMATS = ("md", "html", "latex")


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls the command in an empty folder, on the given runs, and returns the text."""
    monkeypatch.chdir(tmp_path)

    def report(format_: str, new: dict[str, Any], old: dict[str, Any] | None = None) -> str:
        Path("new.json").write_text(json.dumps(new))
        options = ["--format", format_, "--out", f"out.{format_}"]
        if old:
            Path("old.json").write_text(json.dumps(old))
            options += ["--baseline", "old.json"]
        assert exit_code(monkeypatch, "report", "new.json", *options) == 0
        assert capsys.readouterr().out == f"report written to out.{format_}\n"
        return Path(f"out.{format_}").read_text()

    return report


@pytest.mark.parametrize("format_", FORMATS)
def test_verdicts_come_before_speeds_and_failing_ones_first(report: Any, format_: str) -> None:
    """Guards against a regression that is reported far down the page."""
    text = report(format_, run_content(SPEEDUPS | {"lookup": 1.0}), run_content(SPEEDUPS))
    assert text.index("REGRESSED") < text.index("PASS") < text.index("tokens/s")
    assert "Judged by old.json" in text


@pytest.mark.parametrize("format_", FORMATS)
def test_every_arm_is_there_with_its_interval(report: Any, format_: str) -> None:
    """Guards against an arm that is left out, or a speedup without its uncertainty."""
    text = report(format_, run_content(SPEEDUPS))
    text = Page(text).text if format_ == "html" else text
    run = read(Path("new.json"))
    for arm in SPEEDUPS:
        assert arm in text
        assert f"{run.speedup(arm)}" in text
        assert f"{run.speedup(arm, over='hf-generate')}" in text
    assert "A/A floor: two runs of ar differ by up to 1.0" in text


@pytest.mark.parametrize(
    ("disturbed", "told"),
    [
        ({}, ""),
        ({"slices": 40}, ""),
        (
            {"slices": 40, "left_out": 3},
            " 3 of 50 slices of a few steps are not compared, because other work disturbed them.",
        ),
        ({"repeated": 2}, " 2 timed run(s) were measured again, because other work disturbed them."),
        ({"disturbed": 1, "slices": 10, "left_out": 3}, " 1 stayed disturbed. 3 of 20 slices of a few steps"),
    ],
)
def test_what_other_work_disturbed_is_told(disturbed: dict[str, int], told: str) -> None:
    """Guards against runs and slices that do not count, and nobody knows."""
    run = speed_run(lookup=speed_arm(1.2, {"drafter": "lookup"}, **disturbed), linear=speed_arm(1.2, {}, slices=10))
    (floor,) = [note for note in notes(run) if note.startswith("A/A floor")]
    assert floor.partition(" average.")[2].startswith(told)
    assert told or floor.endswith(" average.")


@pytest.mark.parametrize("format_", FORMATS)
def test_a_slower_arm_is_told_with_what_made_it_slower(report: Any, format_: str) -> None:
    """Guards against a verdict without the cause of a slowdown, and an HTML page with an empty drawing of causes."""
    text = report(format_, run_content(SPEEDUPS | {"linear": 1.6}, drafting=0.5), run_content(SPEEDUPS))
    if format_ == "html":
        page = Page(text)
        assert "Change of the time per token of linear, by cause" in page.drawings
        assert "Change of the time per token of hf-assisted, by cause" not in page.drawings
        for cause in ("acceptance length", "drafting", "verifying", "overhead"):
            assert cause in page.texts
    else:
        assert "mostly drafting" in text


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    ("of_all", "said"),
    [({"synthetic": True}, "linear (synthetic)"), ({"ties": 3}, "3/3 ties"), ({"bugs": 1}, "WRONG"), ({}, "equal")],
)
def test_what_is_not_plain_is_marked(report: Any, format_: str, of_all: dict[str, Any], said: str) -> None:
    """Guards against a synthetic time that reads as a speed, and a wrong output that reads as a fast one."""
    text = report(format_, run_content(SPEEDUPS, **of_all))
    assert said in (Page(text).text if format_ == "html" else text)


@pytest.mark.parametrize("format_", FORMATS)
def test_what_a_lossy_arm_holds_and_how_long_it_writes_the_same_is_told(report: Any, format_: str) -> None:
    """Guards against saved memory that is not reported, and a differing text without the length of its agreement."""
    run = run_content(SPEEDUPS)
    linear = run["specdecode"]["arms"]["linear"]
    linear["lossy"], linear["rehearsal"] = True, {"weight_bytes": 163.64e6, "peak_bytes": 20.46e6}
    for row, agreed in zip(linear["rows"].values(), (40, 10, 25), strict=True):
        row["counts"] |= {"agreed": agreed, "peak_cache_bytes": 7.77e6}
    text = report(format_, run)
    text = Page(text).text if format_ == "html" else text.replace("\\%", "%")
    assert "lossy 62%" in text
    assert "before the output first differs from the reference arm's" in text
    assert re.search(r"linear\W*163\.6\W*7\.8\W*20\.5", text)
    assert text.count("163.6") == 1


@pytest.mark.parametrize("format_", FORMATS)
def test_an_arm_that_is_never_right_has_no_figures(report: Any, format_: str) -> None:
    """Guards against "nan" in a table, and a report that fails on the run that needs it most."""
    run = run_content(SPEEDUPS)
    linear = run["specdecode"]["arms"]["linear"]
    linear["rows"], linear["bugs"] = {}, 3
    text = report(format_, run, run_content(SPEEDUPS))
    text = Page(text).text if format_ == "html" else text
    assert "WRONG" in text
    assert "nan" not in text


@pytest.mark.parametrize("format_", FORMATS)
def test_another_machines_baseline_is_told_in_words(report: Any, format_: str) -> None:
    """Guards against a verdict on times of two machines."""
    text = report(format_, run_content(SPEEDUPS), run_content(SPEEDUPS, hardware="calculator"))
    text = Page(text).text if format_ == "html" else text.replace("\\_", "_")
    assert "WRONG_HARDWARE" in text
    assert "the baseline is from calculator and this run from abacus-2-threads" in text
    assert "It was measured on another machine: counters are judged, times are not" in text
    text = report(format_, run_content(SPEEDUPS), run_content(SPEEDUPS, hardware="any"))
    text = Page(text).text if format_ == "html" else text
    assert "It was blessed for its counters alone" in text
    assert "another machine" not in text


@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_not_judged_is_no_pass(report: Any, format_: str) -> None:
    """Guards against counters that depend on the clock reported as a pass."""
    arms = {"ar": 1.0, "hf-generate": 0.9}
    text = report(format_, run_content(arms, timed=True), run_content(arms))
    text = Page(text).text if format_ == "html" else text.replace("\\_", "_")
    assert "NOT_JUDGED" in text
    assert "its time is judged" in text


@pytest.mark.parametrize("format_", FORMATS)
def test_a_run_without_a_baseline_says_so(report: Any, format_: str) -> None:
    """Guards against silence that reads as a pass."""
    text = report(format_, run_content(SPEEDUPS))
    assert "nothing was judged" in text
    assert "PASS" not in text


def test_the_baseline_is_found_by_the_runs_identity(report: Any) -> None:
    """Guards against a report that, unlike the gate, does not find the baseline by itself."""
    file = Path("baselines") / IDENTITY.file
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(run_content(SPEEDUPS, reason="the first")))
    text = report("md", run_content(SPEEDUPS))
    assert f"Judged by {file}, of 2026-01-02: the first." in text
    assert "| PASS | linear | time |" in text


def test_html_takes_hostile_names_for_text(report: Any) -> None:
    """Guards against a run file that injects its own elements into the page."""
    run = run_content(SPEEDUPS | dict.fromkeys(HOSTILE, 1.5), reason=HOSTILE[0])
    run["specdecode"]["versions"][HOSTILE[0]] = run["specdecode"]["conditions"]["after"]["load average"] = HOSTILE[0]
    run["specdecode"]["identity"]["target"] = HOSTILE[0]
    text = report("html", run, run_content(SPEEDUPS, reason=HOSTILE[0]))
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE[0] in page.text
    for name in HOSTILE:
        assert name in page.texts
        assert f"Speedup of {name} over ar" in page.drawings


def test_markdown_takes_hostile_names_for_text(report: Any) -> None:
    """Guards against a name that ends its cell, opens an element, or becomes a link."""
    text = report("md", run_content(SPEEDUPS | dict.fromkeys(HOSTILE, 1.5)))
    assert "<" not in text
    assert "](" not in text
    assert "a\\|b\\`c\\`\\*d\\*[e]\\(f)\\\\\\|" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 6
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table


def test_latex_takes_hostile_names_for_text(report: Any) -> None:
    """Guards against a table that does not compile, or a name that is run as a command."""
    text = report("latex", run_content(SPEEDUPS | dict.fromkeys([*HOSTILE, "\\input{x}", "naïve τ 中"], 1.5)))
    assert "\n50\\%\\_x\\&\\#y\\{\\}\\$\\textbackslash{}\\textasciitilde{}\\textasciicircum{} & " in text
    assert "\n\\textbackslash{}input\\{x\\} & " in text
    assert "\n{}[0] new line & " in text  # after a row's end, LaTeX reads brackets as an argument
    assert "\nnaïve $\\tau$ ? & " in text
    assert text.count("\\begin{tabular}") == text.count("\\toprule") == text.count("\\end{tabular}") == 6


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_latex_compiles(report: Any, tmp_path: Path) -> None:
    """Guards against errors that only TeX itself finds."""
    arms = SPEEDUPS | dict.fromkeys([*HOSTILE, "naïve τ 中"], 1.5)
    report("latex", run_content(arms), run_content(arms | {"linear": 3.0}))
    packages = (tmp_path / "out.latex").read_text().splitlines()[0].removeprefix("% ")
    document = f"\\documentclass{{article}}{packages}\\begin{{document}}\\input{{out.latex}}\\end{{document}}"
    (tmp_path / "paper.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_html_is_one_file_that_asks_for_no_other(report: Any) -> None:
    """Guards against a page that is empty offline, or reveals its reader to other sites."""
    text = report("html", run_content(SPEEDUPS), run_content(SPEEDUPS))
    for outside in ("http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert outside not in text
    assert '<html lang="en">' in text
    assert "width=device-width" in text


def test_every_drawing_has_a_name_and_a_method_one_colour(report: Any) -> None:
    """Guards against a plot without a text description, and a colour that means another arm in the next plot."""
    drawings = Page(report("html", run_content(SPEEDUPS))).drawings
    for arm in SPEEDUPS:
        assert f"Speedup of {arm} over ar" in drawings
    assert {title for title in drawings if "Acceptance" in title} == {"Acceptance of linear", "Acceptance of lookup"}
    colours = {arm: drawings[f"Speedup of {arm} over ar"] for arm in SPEEDUPS}
    assert len({colours["ar"], colours["linear"], colours["lookup"]}) == 3
    assert drawings["Acceptance of linear"] == colours["linear"] == colours["hf-assisted"]
    assert drawings["Acceptance of lookup"] == colours["lookup"]


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=n@localhost", *arguments], check=True)


@pytest.fixture
def blessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a repository whose baseline was blessed twice in this format and once in another, and has moved since."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    file = Path("baselines") / IDENTITY.file
    file.parent.mkdir(parents=True)
    other_format = run_content(SPEEDUPS)
    other_format["specdecode"]["format"] = 1
    before = file.with_name("before.json")
    for place, run in (
        (before, other_format),
        (before, run_content(SPEEDUPS | {"linear": 1.7}, reason="the first", date="2026-01-01")),
        (file, run_content(SPEEDUPS | {"linear": 1.9}, reason="packed linears", date="2026-02-01")),
    ):
        if place is file:
            git("mv", str(before), str(file))
        place.write_text(json.dumps(run, indent=1))
        git("add", ".")
        git("commit", "--quiet", "--message", "baseline")
    return file


def test_history_is_what_git_knows_of_the_baseline(blessed: Path) -> None:
    """Guards against a history that ends where the file was renamed, or that an old format makes unreadable."""
    past = history(blessed)
    assert [run.reason for run in past.runs] == ["the first", "packed linears"]
    assert [round(run.speedup("linear").value, 1) for run in past.runs] == [1.7, 1.9]
    assert "2 of 3 revisions" in past.summary
    assert "Left out: 1 of another format" in past.summary


@pytest.mark.parametrize("format_", ["md", "html"])
def test_history_is_in_the_report(blessed: Path, report: Any, format_: str) -> None:
    """Guards against a history of speedups without the reasons, and a run that appears twice once it is blessed."""
    text = report(format_, run_content(SPEEDUPS, date="2026-03-01"))
    for word in ("the first", "packed linears", "this run", "2026-01-01", "2026-03-01", "0123456789"):
        assert word in text
    assert ("Speedup of lookup over ar, run by run" in text) == (format_ == "html")
    text = report(format_, json.loads(blessed.read_text()))
    assert "this run" in text
    assert "packed linears" not in text.partition("revisions of")[2]


def test_without_git_there_is_no_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Any, blessed: Path
) -> None:
    """Guards against a report that fails without a repository, or without git."""
    assert history(tmp_path / "nothing.json").runs == []
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert "git is not installed." in report("md", run_content(SPEEDUPS))


def test_a_replay_that_lost_its_text_is_told(report: Any) -> None:
    """Guards against a replayed speed whose real acceptance after a tie was not the set 0.8."""
    run = run_content(SPEEDUPS, options={"drafter": "model", "replay": 0.8})
    assert "left the replayed text" not in report("md", run)
    arm = next(arm for arm in SPEEDUPS if arm != "ar")
    run["specdecode"]["arms"][arm]["ties"] = 2
    assert f"Outputs that left the replayed text at a tie: {arm} (2)." in report("md", run)
    assert "found no place" not in report("md", run)
    for row in run["specdecode"]["arms"][arm]["rows"].values():
        row["counts"]["lost"] = 4
    text = report("md", run)
    assert f"Drafts that found no place in the replayed text: {arm} (12 of 60). Fewer proposals were accepted" in text


def test_an_arm_that_captures_in_each_run_is_told(report: Any) -> None:
    """Guards against times with captures or compilations in them that nobody knows of."""
    run = run_content(SPEEDUPS)
    assert "captured CUDA graphs" not in report("md", run)
    run["specdecode"]["arms"]["lookup"]["captured"] = 2
    assert "captured CUDA graphs or compiled, even when repeated: lookup (2)." in report("md", run)


def test_the_command_measures_the_same_again(report: Any) -> None:
    """Guards against a number that nobody can reproduce."""
    found = re.search(r"pytest --benchmark .*", Page(report("html", run_content(SPEEDUPS))).text)
    assert found
    assert {
        *("--target=t", "--draft=d", "--dtype=float32", "--preset=quick", "--device=cpu"),
        *("--prompts=text:2,prose:1", "--max-new-tokens=40", "--repeats=1"),
    } == set(shlex.split(found[0])[2:])


@pytest.mark.parametrize(
    ("preset", "given"),
    [("a.b", "--preset=a.b.toml"), ("quick.tiny", "--preset=quick"), ("quick.tiny.eos", "--preset=quick")],
)
def test_the_command_has_the_options_that_made_another_experiment(preset: str, given: str, report: Any) -> None:
    """Guards against a printed command that runs for hours where the shown run was a tiny one of seconds."""
    run = run_content(SPEEDUPS)
    run["specdecode"]["identity"]["preset"] = preset
    text = report("md", run)
    assert f" {given} " in text
    for flag in ("tiny", "eos"):
        assert (f"--{flag}" in text) == (f".{flag}" in preset)


def test_the_command_has_the_backend_and_the_rule_for_repeats(report: Any) -> None:
    """Guards against a repeated run whose times the gate does not compare with the shown run's."""
    run = run_content(SPEEDUPS)
    run["specdecode"]["versions"]["backend"] = "packed"
    run["specdecode"]["until"] = 0.05
    text = report("md", run)
    assert " --backend=packed --until=0.05" in text
    assert "--repeats" not in text


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_says_what_limits_the_speedup(report: Any, format_: str) -> None:
    assert "What limits the speedup" in report(format_, run_content(SPEEDUPS))


def test_the_tiles_are_of_lossless_arms_and_name_unchecked_ones(report: Any) -> None:
    """Guards against a headline of an arm that loses quality, and of outputs that nobody checked."""
    run = run_content(SPEEDUPS | {"lossy": 9.0, "theirs": 8.0})
    for arm, options in (("lossy", {"policy": "sink-window"}), ("theirs", {"call": "a:b", "lossy": True})):
        run["specdecode"]["arms"][arm] |= {"lossy": True, "options": options}
    text = Page(report("html", run)).text
    best = max(SPEEDUPS, key=SPEEDUPS.__getitem__)
    assert re.search(rf"Fastest lossless\s*[\d.]+ times ar\s*{best}", text)
    assert "with the same loss); not checked: theirs" in text


def test_html_goes_beside_the_run_and_folders_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against an HTML page printed on the terminal, and a report that is lost because its folder is missing."""
    run = tmp_path / "run.json"
    run.write_text(json.dumps(run_content(SPEEDUPS)))
    assert exit_code(monkeypatch, "report", str(run), "--format", "html") == 0
    assert capsys.readouterr().out == f"report written to {tmp_path / 'run.html'}\n"
    assert exit_code(monkeypatch, "report", str(run), "--out", str(tmp_path / "a" / "b" / "run.md")) == 0
    assert (tmp_path / "a" / "b" / "run.md").read_text().startswith("## t with d")
    assert exit_code(monkeypatch, "report", str(run), "--format", "latex") == 0
    assert "\\begin{tabular}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run.html", "run.json"]


@pytest.mark.parametrize("format_", FORMATS)
def test_several_runs_are_told_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    """Guards against a report of several runs that omits one, or writes two HTML pages into one file."""
    for hardware in ("abacus", "calculator"):
        (tmp_path / hardware).write_text(json.dumps(run_content(SPEEDUPS, hardware=hardware)))
    runs = [str(tmp_path / "abacus"), str(tmp_path / "calculator")]
    assert exit_code(monkeypatch, "report", *runs, "--format", format_, "--out", str(tmp_path / "out")) == 0
    text = (tmp_path / "out").read_text()
    assert 0 < text.index("on abacus, preset quick") < text.index("on calculator, preset quick")
    assert text.count("lookup") >= 4
    assert text.count("<html") == text.count("<main") == (format_ == "html")


@pytest.mark.parametrize("case", ["cut off", "not there", "bad baseline", "unwritable"])
def test_what_is_wrong_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """Guards against a traceback, and a report on half a file."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(run_content(SPEEDUPS)))
    if case != "not there":
        bad.write_text(good.read_text()[:300])
    options = {"bad baseline": (good, "--baseline", bad), "unwritable": (good, "--out", bad / "report.md")}
    assert exit_code(monkeypatch, "report", *map(str, options.get(case, (bad,)))) == 2
    told = capsys.readouterr().err
    assert told.startswith("specdecode: ")
    assert told.count("\n") == 1
    assert "bad.json" in told


def test_files_that_are_no_runs_are_named_and_the_others_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against `report *.json` that reports nothing because of one foreign file, and against an exit code by
    which a script takes the rest for all files.
    """
    names = ("a", "b", "cut", "other", "gone", "empty")
    a, b, cut, other, gone, empty = (tmp_path / f"{name}.json" for name in names)
    a.write_text(json.dumps(run_content(SPEEDUPS, hardware="abacus")))
    b.write_text(json.dumps(run_content(SPEEDUPS, hardware="calculator")))
    cut.write_text(a.read_text()[:300])
    other.write_text('{"name": "package", "version": 3}')
    empty.write_text("")
    files = map(str, (cut, a, other, gone, b, empty))
    assert exit_code(monkeypatch, "report", *files, "--out", str(tmp_path / "report.md")) == 2
    told = capsys.readouterr()
    sentences = told.err.splitlines()
    assert [[file.name for file in (a, b, cut, other, gone, empty) if str(file) in line] for line in sentences] == [
        ["cut.json"],
        ["other.json"],
        ["gone.json"],
        ["empty.json"],
    ]
    assert all(line.startswith("specdecode: ") for line in sentences)
    assert told.out == f"report written to {tmp_path / 'report.md'}\n"
    text = (tmp_path / "report.md").read_text()
    assert 0 < text.index("on abacus, preset quick") < text.index("on calculator, preset quick")
    # The page is named after the first run file.
    assert exit_code(monkeypatch, "report", str(cut), str(a), "--format", "html") == 2
    assert capsys.readouterr().out == f"report written to {tmp_path / 'a.html'}\n"
    assert exit_code(monkeypatch, "report", str(cut), str(gone)) == 2
    assert capsys.readouterr().out == ""
    # A fault that all files share is reported once.
    assert exit_code(monkeypatch, "report", str(a), str(b), "--baseline", str(cut)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    """Guards against seconds of imports, and a report that fails where PyTorch is not installed."""
    run = tmp_path / "run.json"
    run.write_text(json.dumps(run_content(SPEEDUPS)))
    code = (
        "import sys; from specdecode import cli\n"
        "for form in sys.argv[2:]:\n"
        "    sys.argv[1:] = ['report', sys.argv[1], '--format', form]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: assert not end.code, form\n"
        "    sys.argv[1:2] = []\n"
        "    assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), form"
    )
    command = [sys.executable, "-c", code, str(run), *FORMATS, "comment"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 800), ("light", 390), ("dark", 390)]
)
def test_a_browser_shows_the_page(blessed: Path, report: Any, tmp_path: Path, scheme: str, width: int) -> None:
    """Guards against a page that scrolls sideways on a phone, is dark on dark, squeezes names, or loads other files."""
    page = report("html", run_content(SPEEDUPS | {"a-very-long-name-" * 6: 1.1, "linear": 1.5}, drafting=0.6))
    seen = look_at(page, scheme, width, tmp_path)
    assert seen["scroll"] <= width
    assert seen["arm"] > 120
    assert seen["drawings"] == page.count("<svg")
    ground, ink = seen["ground"], seen["ink"]
    assert (ground < 150 < 600 < ink) if scheme == "dark" else (ink < 150 < 600 < ground)


@pytest.mark.parametrize("name", ["tests.yml", "gpu.yml", "release.yml"])
def test_workflows_name_what_there_is(name: str) -> None:
    """Guards against a workflow with a renamed tox environment, and against script injection through its inputs."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    known = {section.removeprefix("testenv:") for section in tox.sections()}
    scripts = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    used = {
        env for script in scripts for names in re.findall(r"tox .*?-e ([\w,]+)", script) for env in names.split(",")
    }
    assert used
    assert used <= known
    assert not [script for script in scripts if "${{" in script]
    assert workflow["permissions"] == {"contents": "read"}


def test_the_job_that_may_comment_runs_no_code_of_a_pull_request() -> None:
    """Guards against a token with write access exposed to the code of a pull request."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text())
    job = workflow["jobs"]["comment"]
    assert job["permissions"] == {"pull-requests": "write"}
    assert [step["uses"].split("@")[0] for step in job["steps"] if "uses" in step] == ["actions/download-artifact"]
    assert [name for name, other in workflow["jobs"].items() if "write" in str(other.get("permissions"))] == [
        *("comment", "bless")
    ]
