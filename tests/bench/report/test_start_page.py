"""The start page of a folder of runs: `specdecode report DIR --format html`."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from specdecode.bench.gate.verdicts import judge
from specdecode.bench.quality.quality_page import entry
from specdecode.bench.report.elements import document
from specdecode.bench.report.html import section
from specdecode.bench.report.start_page import Chip, speed_entry
from specdecode.bench.runs.file import parse
from specdecode.bench.runs.names import margins_file
from specdecode.evals.margins import check_margins
from specdecode.evals.results_file import write
from tests.helpers.command_line import exit_code
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.quality_runs import HEADER, whole_quality_run
from tests.helpers.run_contents import IDENTITY, SPEEDUPS, run_content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of three runs and files that are no runs, in a project with a baseline and margins."""
    monkeypatch.chdir(tmp_path)
    baseline, margins = (Path("baselines") / file for file in (IDENTITY.file, margins_file(HEADER.target, "prose")))
    for file in (baseline, margins):
        file.parent.mkdir(parents=True)
    baseline.write_text(json.dumps(run_content(SPEEDUPS)))
    margins.write_text(json.dumps({"margins": {"sink-window-8": {"nll": 0.01}, "int8": {"nll": 1.0}}}))
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "old.json").write_text(json.dumps(run_content(SPEEDUPS, date="2026-01-01")))
    (runs / "a #1?.json").write_text(json.dumps(run_content(SPEEDUPS | {"lookup": 0.8}, date="2026-03-01")))
    (runs / "quality.json").write_text(write(whole_quality_run()))
    os.utime(runs / "quality.json", (1.77e9, 1.77e9))  # 2026-02-02
    (runs / "margins.json").write_text('{"margins": {}}')
    (runs / "list.json").write_text("[]")
    (runs / "notes.txt").write_text("no run")
    return runs


def rows(page: str) -> list[list[str]]:
    """Return the texts of a table's rows."""
    body = page.partition("<tbody>")[2]
    return [
        [unescape(re.sub("<[^>]*>", " ", cell)).strip() for cell in re.findall("<t[hd].*?</t[hd]>", row)]
        for row in re.findall("<tr>.*?</tr>", body)
    ]


def test_a_folder_becomes_a_start_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a run that is left out, a link that leads nowhere, and the oldest run on top."""
    assert exit_code(monkeypatch, "report", str(folder), "--format", "html") == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"report written to {folder / 'index.html'}\n", "")
    page = (folder / "index.html").read_text()
    newest, quality, oldest = rows(page)
    assert newest[:2] == ["2026-03-01", "t with d"]
    assert newest[2].split("  ") == ["✗ 1 REGRESSED", "✓ 9 PASS"]
    assert newest[3].startswith("linear 2.04 [")
    assert newest[4:] == ["float32 on abacus-2-threads", "quick"]
    assert quality == ["2026-02-02", "t", "✗ 1 of 4 margins fail", "", "float32", "quick (quality)"]
    assert oldest[0] == "2026-01-01"
    assert oldest[2] == "✓ 10 PASS"
    links = [unquote(link) for link in re.findall('href="([^"]*)"', page)]
    assert links == ["a #1?.html", "quality.html", "old.html"]
    texts = [Page((folder / link).read_text()).text for link in links]
    assert ["REGRESSED" in text for text in texts] == [True, False, False]
    assert "Quality of t" in texts[1]
    for outside in ("http:", "https:", "src=", "url(", "<script", "<link"):
        assert outside not in page


@pytest.mark.parametrize("format_", ["md", "comment", "latex"])
def test_other_formats_report_the_runs_of_a_folder_as_if_they_were_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    """Guards against a folder that only one format reads, and a run that is reported twice."""
    assert exit_code(monkeypatch, "report", str(folder), str(folder / "old.json"), "--format", format_) == 0
    of_folder = capsys.readouterr().out
    named = [str(folder / name) for name in ("a #1?.json", "old.json", "quality.json")]
    assert exit_code(monkeypatch, "report", *named, "--format", format_) == 0
    assert capsys.readouterr().out == of_folder != ""
    assert not list(folder.glob("*.html"))


def test_a_damaged_run_is_named_and_the_others_are_on_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a run that disappears in silence, and against a page that one damaged file prevents."""
    (folder / "cut.json").write_text((folder / "old.json").read_text()[:300])
    other_format = run_content(SPEEDUPS)
    other_format["specdecode"]["format"] = 1
    (folder / "version.json").write_text(json.dumps(other_format))
    assert exit_code(monkeypatch, "report", str(folder), "--format", "html") == 2
    cut, version = capsys.readouterr().err.splitlines()
    assert "cut.json cannot be read" in cut
    assert "version.json cannot be judged: its format is 1" in version
    assert len(rows((folder / "index.html").read_text())) == 3


@pytest.mark.parametrize("files", [{}, {"package.json": "{}"}])
def test_a_folder_without_runs_is_told_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str],
) -> None:
    """Guards against an empty page with exit code 0."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for format_ in ("html", "md"):
        assert exit_code(monkeypatch, "report", str(tmp_path), "--format", format_) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(f"specdecode: {tmp_path} has no run files: ")
        assert told.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_out_names_the_start_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against links that hold only beside the runs, and against a start page that a run's page replaces."""
    out = tmp_path / "site" / "start.html"
    assert exit_code(monkeypatch, "report", str(folder), "--format", "html", "--out", str(out)) == 0
    links = re.findall('href="([^"]*)"', out.read_text())
    assert len(links) == 3
    assert all((out.parent / unquote(link)).exists() for link in links)
    assert not (folder / "index.html").exists()
    (folder / "old.json").rename(folder / "index.json")
    capsys.readouterr()
    assert exit_code(monkeypatch, "report", str(folder), "--format", "html") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "index.json: its page would replace the start page" in told
    assert len(rows((folder / "index.html").read_text())) == 2


def test_pages_of_baselines_are_not_among_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against pages that are committed with the baselines."""
    baseline = Path("baselines") / IDENTITY.file
    page = Path("results", IDENTITY.file).with_suffix(".html")
    assert exit_code(monkeypatch, "report", str(baseline), "--format", "html") == 0
    assert capsys.readouterr().out == f"report written to {page}\n"
    page.unlink()
    assert exit_code(monkeypatch, "report", str(baseline.parent), "--format", "html") == 0
    (link,) = re.findall('href="([^"]*)"', (page.parent / "index.html").read_text())
    assert unquote(link) == page.name
    assert page.exists()
    other = Path("baselines", "other-machine", baseline.name)
    other.parent.mkdir()
    other.write_text(json.dumps(run_content(SPEEDUPS, hardware="other-machine")))
    both = [str(baseline.parent), str(other.parent)]
    assert exit_code(monkeypatch, "report", *both, "--format", "html") == 0
    links = re.findall('href="([^"]*)"', (page.parent / "index.html").read_text())
    pages = {(page.parent / unquote(link)).resolve() for link in links}
    assert pages == {Path("results", machine, page.name).resolve() for machine in (page.parent.name, "other-machine")}
    assert not list(Path("baselines").rglob("*.html"))


def test_a_run_of_quality_has_the_day_of_its_measurement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that a copy of its file makes the newest one."""
    (folder / "quality.json").write_text(write(replace(whole_quality_run(), datetime="2025-12-24T23:00:00+00:00")))
    assert exit_code(monkeypatch, "report", str(folder), "--format", "html") == 0
    dates = [row[0] for row in rows((folder / "index.html").read_text())]
    assert dates == ["2026-03-01", "2026-01-01", "2025-12-24"]


@pytest.mark.parametrize("fault", [{"rows": {}, "bugs": 3}, {"bugs": 1}, {"failure": "its server died"}], ids=str)
def test_an_entry_counts_only_what_is_lossless_and_right(fault: dict[str, Any]) -> None:
    """Guards against a lossy, a wrong or a failed arm that is praised as the fastest."""
    content = run_content(SPEEDUPS)
    arms = content["specdecode"]["arms"]
    arms["linear"]["lossy"] = True
    arms["hf-assisted"] |= fault
    run = parse(json.dumps(content), Path("run.json"))
    row = speed_entry(run, [])
    assert row.fastest.startswith("lookup 1.33 [")
    assert row.verdicts == [Chip("bad", "✗ 1 arm without a right output")]
    assert Page(document("title", section(run, "title", "", []))).text.count("1.33 times ar") == 1
    assert speed_entry(parse(json.dumps(run_content({"ar": 1.0, "x": 0.5})), Path("x")), []).fastest == (
        "none beyond the noise"
    )
    assert speed_entry(run, judge(run, run)).verdicts[1].kind == "bad"
    whole = whole_quality_run()
    assert entry(whole, check_margins(whole, {}), "2026-01-01").verdicts == [Chip("warn", "- not judged")]
    kept = check_margins(whole, {"int8": {"nll": 1.0}})
    assert entry(whole, kept, "2026-01-01").verdicts == [Chip("good", "✓ 1 margins kept")]


def test_a_start_page_takes_hostile_names_for_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run or a file name that injects its own elements into the page."""
    content = run_content(SPEEDUPS)
    content["specdecode"]["identity"]["target"] = HOSTILE[0]
    (folder / '"><img onerror=x>.json').write_text(json.dumps(content))
    assert exit_code(monkeypatch, "report", str(folder), "--format", "html") == 0
    page = Page((folder / "index.html").read_text())
    assert not {"script", "img"} & set(page.tags)
    assert f"{HOSTILE[0]} with d" in page.texts
