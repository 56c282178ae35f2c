"""`specdecode report`: report the results of runs."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import quote

import typer

from specdecode.cli.output import Faults, say
from specdecode.support.files import check_writable, write_whole

if TYPE_CHECKING:
    from specdecode.bench.report.start_page import Entry
    from specdecode.bench.runs.records import RunFile
    from specdecode.evals.results import QualityRun


class Format(str, enum.Enum):
    md = "md"
    comment = "comment"
    html = "html"
    latex = "latex"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="run files, from pytest --benchmark --benchmark-json or pytest --quality, or folders of run files"
        ),
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="run file to judge by, or margins of quality  [default: each run's own in baselines/, if there is one]"
        ),
    ] = None,
    speed: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="with a run of quality: run of speeds that shows the gain of its arms"),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="Markdown, a short comment, one HTML page, or LaTeX tables")
    ] = Format.md,
    out: Annotated[
        Path | None,
        typer.Option(
            help="file to write  [default: standard output; for HTML, RUN.html beside the first run, or index.html in"
            " the first folder; pages of baselines go to results/]"
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="folder for figures, as PDF and PNG; with several runs, each has a folder of its own in it",
        ),
    ] = None,
) -> None:
    """Report the results of runs, from the files alone: verdicts, speeds, acceptance and history, or costs in quality.
    With --figures, figures are drawn, and a report is written only if --out names its file.

    If a folder is named, all run files in it are reported. With --format html, a start page has one row for each run,
    newest first, and the page of each run is written beside its file.

    A file that is no run, or that cannot be judged, is named, and the others are reported. Exit code 0: all were
    reported; 2: some were not."""
    from specdecode.bench.runs.file import read
    from specdecode.evals.results import QualityRun

    if out is not None:
        check_writable(out)
    faults = Faults()
    folders, files, read_runs = [path for path in runs if path.is_dir()], _files(runs, faults), []
    for path in files:
        with faults.noted():
            read_runs.append((path, _read(path)))
    speeds = read(speed) if speed else None
    if speeds and read_runs and not any(isinstance(run, QualityRun) for _, run in read_runs):
        raise ValueError("--speed is of no use without a run of `pytest --quality`: leave it out")
    if figures is not None:
        _draw(read_runs, speeds, {path: figures / path.stem if len(files) > 1 else figures for path in files})
    reports = []
    for path, run in read_runs if figures is None or out is not None else ():
        with faults.noted():
            reports.append(_report_of(path, run, baseline, speeds, format))
    if reports and format is Format.html and folders:
        _write_start_page(reports, out or _page_of(folders[0] / "index"), faults)
    elif reports and format is Format.html:
        _write(_page(*reports), out or _page_of(reports[0].path))
    elif reports:
        _write("\n".join(report.content for report in reports), out)
    if faults.sentences:
        raise typer.Exit(2)


class _Report(NamedTuple):
    """The report of a run.

    Attributes:
        path: file of the run.
        title: models and settings.
        content: elements of a page, or a text.
        entry: returns the run's entry on a start page.
    """

    path: Path
    title: str
    content: Any
    entry: Callable[[], Entry]


def _files(paths: Sequence[Path], faults: Faults) -> list[Path]:
    """Return the run files: the named ones, and those in the named folders. Each is there once."""
    files: list[Path] = []
    for path in paths:
        with faults.noted():
            files += _runs_in(path) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def _runs_in(folder: Path) -> list[Path]:
    """Return the run files in a folder, by name. Damaged files are among them, so that reading them names the damage.

    Raises:
        ValueError: there are none.
    """
    from specdecode.bench.runs.file import KEY
    from specdecode.evals.results_file import KEY as QUALITY_KEY
    from specdecode.support.checked import read_json

    def may_be_run(path: Path) -> bool:
        try:
            content = read_json(path)
        except ValueError:
            return True
        return isinstance(content, dict) and not {KEY, QUALITY_KEY}.isdisjoint(content)

    files = [path for path in sorted(folder.glob("*.json")) if may_be_run(path)]
    if not files:
        raise ValueError(f"{folder} has no run files: name a folder with files of pytest --benchmark-json or --quality")
    return files


def _page_of(run: Path) -> Path:
    """Return the path of a run's page: beside the run; for a baseline, in results/, as baselines are committed."""
    from specdecode.bench.gate.project import read_project

    page, baselines = run.with_suffix(".html"), read_project(Path()).baselines.resolve()
    # Baselines of one name differ in their folder, the hardware.
    return Path("results") / page.resolve().relative_to(baselines) if page.resolve().is_relative_to(baselines) else page


def _page(*reports: _Report) -> str:
    """Return the HTML page of one or several runs."""
    from specdecode.bench.report.elements import document

    return document("; ".join(report.title for report in reports), *(report.content for report in reports))


def _write_start_page(reports: Sequence[_Report], out: Path, faults: Faults) -> None:
    """Write the page of each run, and the start page, which lists the newest runs first."""
    from specdecode.bench.report.start_page import start_page

    entries = []
    for report in reports:
        page = _page_of(report.path)
        with faults.noted():
            if page == out:
                raise ValueError(f"{report.path}: its page would replace the start page {out}: name another by --out")
            write_whole(page, _page(report))
            entry = report.entry()
            # Runs of one day are ordered by the times of their files.
            entries.append((entry.date, report.path.stat().st_mtime, entry, quote(os.path.relpath(page, out.parent))))
    entries.sort(key=lambda entry: entry[:2], reverse=True)
    if entries:
        _write(start_page([(entry, page) for _, _, entry, page in entries]), out)


def _read(path: Path) -> RunFile | QualityRun:
    """Read a run of speeds or of quality."""
    from specdecode.bench.runs.file import read
    from specdecode.evals.results_file import is_run
    from specdecode.evals.results_file import read as read_quality

    return read_quality(path) if is_run(path) else read(path)


def _write(text: str, out: Path | None) -> None:
    """Write a report to a file, or to standard output."""
    if out is None:
        say(text, end="")
    else:
        write_whole(out, text)
        say(f"report written to {out}")


def _report_of(
    path: Path, run: RunFile | QualityRun, judge_by: Path | None, speeds: RunFile | None, format: Format
) -> _Report:
    """Report a run.

    Args:
        path: file of the run.
        run: a run of speeds or of quality.
        judge_by: a baseline or margins; None for the run's own.
        speeds: run of speeds with the arms of a run of quality.
        format: format of the report.
    """
    from specdecode.evals.results import QualityRun

    if isinstance(run, QualityRun):
        return _quality_report(path, run, judge_by, speeds, format)
    return _speed_report(path, run, judge_by, format)


def _speed_report(path: Path, run: RunFile, baseline: Path | None, format: Format) -> _Report:
    from specdecode.bench.gate.baselines import find
    from specdecode.bench.gate.history import history
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.gate.verdicts import judge_by_baseline
    from specdecode.bench.report.captions import judged_by, title
    from specdecode.bench.report.comment import comment
    from specdecode.bench.report.html import section
    from specdecode.bench.report.latex import latex
    from specdecode.bench.report.markdown import markdown
    from specdecode.bench.report.start_page import speed_entry
    from specdecode.bench.runs.file import read

    project = read_project(Path())
    own_baseline = project.baselines / run.header.identity.file
    old = read(baseline) if baseline else find(run.header.identity, project.baselines)
    tolerance = project.tolerance(run.header)
    judgements = judge_by_baseline(run, old, tolerance, tolerances=project.tolerances) if old else []
    about = (run, title(run), judged_by(run, old, own_baseline), judgements)
    if format is Format.comment:
        content: Any = comment(*about, project.gate, str(run.path))
    else:
        write: dict[Format, Callable[..., Any]] = {Format.md: markdown, Format.latex: latex}
        write[Format.html] = partial(section, gate=project.gate)
        content = write[format](*about, history(own_baseline))
    return _Report(path, title(run), content, lambda: speed_entry(run, judgements))


def _quality_report(
    path: Path, run: QualityRun, margins: Path | None, speed: RunFile | None, format: Format
) -> _Report:
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.quality.quality_page import entry, section
    from specdecode.bench.quality.quality_tables import comment, latex, markdown, title
    from specdecode.bench.runs.names import margins_file
    from specdecode.evals.margins import check_margins, read_margins

    own_margins = read_project(Path()).baselines / margins_file(run.header.target, run.header.texts)
    if margins is not None and not margins.exists():
        raise ValueError(f"{margins} cannot be read: there is no such file of margins")
    checks = check_margins(run, read_margins(margins or own_margins))
    if format is Format.comment:
        content: Any = comment(run, checks, str(path))
    else:
        write: dict[Format, Callable[..., Any]] = {Format.md: markdown, Format.html: section, Format.latex: latex}
        content = write[format](run, checks, speed)

    def day() -> str:
        # Older files of quality do not have the date of their run.
        return run.datetime[:10] or f"{date.fromtimestamp(path.stat().st_mtime)}"

    return _Report(path, title(run), content, lambda: entry(run, checks, day()))


def _draw(
    runs: Sequence[tuple[Path, RunFile | QualityRun]], speed: RunFile | None, folders: Mapping[Path, Path]
) -> None:
    """Draw the figures of each run, and print their names and the reasons for missing ones.

    Args:
        runs: pairs of a file and its run.
        speed: run of speeds, for runs of the quality suite.
        folders: folder of the figures, by the run's file.

    Raises:
        ValueError: matplotlib is missing, or several runs would share a folder.
    """
    from specdecode.evals.results import QualityRun

    try:
        from specdecode.bench.quality.quality_figures import write as write_quality
        from specdecode.bench.report.figures import write
    except ImportError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install 'specdecode[figures]'") from error
    if same := {folder.name for folder in folders.values() if [*folders.values()].count(folder) > 1}:
        raise ValueError(f"several runs are named {min(same)!r}, and would share a folder: draw them one by one")
    for path, run in runs:
        folder = folders[path]
        if isinstance(run, QualityRun):
            missing, also = write_quality(run, folder, speed), ""
        else:
            missing, also = write(run, folder), "table1.tex; "
        drawn = ", ".join(name for name in missing if not missing[name])
        say(f"{folder}: {also}as .pdf and .png {drawn}")
        for name, reason in missing.items():
            if reason:
                say(f"  no {name}: {reason}")
