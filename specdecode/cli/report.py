"""`specdecode report`: what runs found."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdecode.cli.messages import note
from specdecode.cli.output import say
from specdecode.support.files import check_writable, write_whole

if TYPE_CHECKING:
    from specdecode.bench.runs.records import RunFile
    from specdecode.evals.results import QualityRun


class Format(str, enum.Enum):
    md = "md"
    comment = "comment"
    html = "html"
    latex = "latex"


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="run files, from pytest --benchmark --benchmark-json or pytest --quality")
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="run file to judge by, or margins of quality  [default: each run's own in baselines/, if there is one]"
        ),
    ] = None,
    speed: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="with a run of quality: what its arms gain, by this run of speeds"),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="Markdown, a comment of few lines, one HTML page, or LaTeX tables")
    ] = Format.md,
    out: Annotated[
        Path | None,
        typer.Option(help="file to write  [default: standard output; for HTML RUN.html beside the first run]"),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="folder to draw into, as PDF and PNG; of several runs each into one of its own",
        ),
    ] = None,
) -> None:
    """Tell what runs found, from the files alone: verdicts, speeds, acceptance, history; or quality and what it costs.
    With --figures the figures are drawn, and a report is written only where --out names its file.

    A file that is no run, or that cannot be judged, is named, and the others are reported. Exit code 0: all were
    reported; 2: some were not."""
    from specdecode.bench.report.elements import document
    from specdecode.bench.runs.file import read
    from specdecode.evals.results import QualityRun

    if out is not None:
        check_writable(out)
    faults = _Faults()
    read_runs = []
    for path in runs:
        with faults.noted():
            read_runs.append((path, _read(path)))
    speeds = read(speed) if speed else None
    if speeds and read_runs and not any(isinstance(run, QualityRun) for _, run in read_runs):
        raise ValueError("--speed is of no use without a run of `pytest --quality`: leave it out")
    if figures is not None:
        _draw(read_runs, speeds, {path: figures / path.stem if len(runs) > 1 else figures for path in runs})
    reports = []
    for path, run in read_runs if figures is None or out is not None else ():
        with faults.noted():
            reports.append((path, *_report_of(path, run, baseline, speeds, format)))
    if reports:
        if format is Format.html:
            text = document("; ".join(title for _, title, _ in reports), *(about for _, _, about in reports))
            out = out or reports[0][0].with_suffix(".html")
        else:
            text = "\n".join(about for _, _, about in reports)
        _write(text, out)
    if faults.sentences:
        raise typer.Exit(2)


class _Faults:
    """What is wrong with some of the runs.

    Attributes:
        sentences: that were told.
    """

    def __init__(self) -> None:
        self.sentences: set[str] = set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Tell what is wrong with a run, and go on with the next. A sentence of several runs is told once."""
        try:
            yield
        except ValueError as error:
            if str(error) not in self.sentences:
                note(f"specdecode: {error}")
            self.sentences.add(str(error))


def _read(path: Path) -> RunFile | QualityRun:
    """Read a run of speeds or of quality."""
    from specdecode.bench.runs.file import read
    from specdecode.evals.results_file import is_run
    from specdecode.evals.results_file import read as read_quality

    return read_quality(path) if is_run(path) else read(path)


def _write(text: str, out: Path | None) -> None:
    """Write a report into a file, or on the standard output."""
    if out is None:
        say(text, end="")
    else:
        write_whole(out, text)
        say(f"report written to {out}")


def _report_of(
    path: Path, run: RunFile | QualityRun, judge_by: Path | None, speeds: RunFile | None, format: Format
) -> tuple[str, Any]:
    """Return the title of a run and its report: elements of a page, or a text.

    Args:
        path: the run's file.
        run: of speeds or of quality.
        judge_by: a baseline or margins; None for the run's own.
        speeds: of the arms of a run of quality.
        format: of the report.
    """
    from specdecode.evals.results import QualityRun

    if isinstance(run, QualityRun):
        return _quality_report(path, run, judge_by, speeds, format)
    return _speed_report(run, judge_by, format)


def _speed_report(run: RunFile, baseline: Path | None, format: Format) -> tuple[str, Any]:
    from specdecode.bench.gate.baselines import find
    from specdecode.bench.gate.history import history
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.gate.verdicts import judge_by_baseline
    from specdecode.bench.report.captions import judged_by, title
    from specdecode.bench.report.comment import comment
    from specdecode.bench.report.html import section
    from specdecode.bench.report.latex import latex
    from specdecode.bench.report.markdown import markdown
    from specdecode.bench.runs.file import read

    project = read_project(Path())
    own_baseline = project.baselines / run.header.identity.file
    old = read(baseline) if baseline else find(run.header.identity, project.baselines)
    judgements = judge_by_baseline(run, old, project.tolerance, tolerances=project.tolerances) if old else []
    about = (run, title(run), judged_by(run, old, own_baseline), judgements)
    if format is Format.comment:
        return title(run), comment(*about, project.gate, str(run.path))
    tell: dict[Format, Callable[..., Any]] = {Format.md: markdown, Format.html: section, Format.latex: latex}
    return title(run), tell[format](*about, history(own_baseline))


def _quality_report(
    path: Path, run: QualityRun, margins: Path | None, speed: RunFile | None, format: Format
) -> tuple[str, Any]:
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.quality.quality_page import section
    from specdecode.bench.quality.quality_tables import comment, latex, markdown, title
    from specdecode.bench.runs.names import margins_file
    from specdecode.evals.margins import check_margins, read_margins

    own_margins = read_project(Path()).baselines / margins_file(run.header.target, run.header.texts)
    checks = check_margins(run, read_margins(margins or own_margins))
    if format is Format.comment:
        return title(run), comment(run, checks, str(path))
    if format is not Format.html:
        return title(run), (markdown if format is Format.md else latex)(run, checks, speed)
    return title(run), section(run, checks, speed)


def _draw(
    runs: Sequence[tuple[Path, RunFile | QualityRun]], speed: RunFile | None, folders: Mapping[Path, Path]
) -> None:
    """Draw each run, and say what was drawn and why other figures were not.

    Args:
        runs: by their files.
        speed: for those of the quality suite.
        folders: that are drawn into, by the files of runs.
    """
    from specdecode.evals.results import QualityRun

    try:
        from specdecode.bench.quality.quality_figures import write as write_quality
        from specdecode.bench.report.figures import write
    except ImportError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install 'specdecode[figures]'") from error
    if same := {folder.name for folder in folders.values() if [*folders.values()].count(folder) > 1}:
        raise ValueError(f"several runs are named {min(same)!r}, and so would be their folders: draw them one by one")
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
