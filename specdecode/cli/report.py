"""`specdecode report`: what runs found."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from specdecode.bench.runs.records import RunFile


class Format(str, enum.Enum):
    md = "md"
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
    format: Annotated[Format, typer.Option(help="Markdown, one HTML page, or LaTeX tables")] = Format.md,
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
    With --figures what is written is told in place of the text, which then needs --out."""
    from specdecode.bench.report.elements import document
    from specdecode.bench.runs.file import read
    from specdecode.evals.results import is_run
    from specdecode.support.files import write_whole

    of_quality = {run: is_run(run) for run in runs}
    if speed is not None and not any(of_quality.values()):
        raise ValueError("--speed is of no use without a run of `pytest --quality`: leave it out")
    speeds = read(speed) if speed else None
    if figures is not None:
        _draw(of_quality, speeds, figures)
        if out is None:
            return
    told = [
        _told_quality(run, baseline, speeds, format) if of_quality[run] else _told_speed(run, baseline, format)
        for run in runs
    ]
    if format is Format.html:
        text = document("; ".join(title for title, _ in told), *(about for _, about in told))
    else:
        text = "\n".join(about for _, about in told)
    if out is None and format is Format.html:
        out = runs[0].with_suffix(".html")
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        write_whole(out, text)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None
    typer.echo(f"report written to {out}")


def _told_speed(path: Path, baseline: Path | None, format: Format) -> tuple[str, Any]:
    """The title of a run of speeds, and what is told of it: elements of a page, or a text."""
    from specdecode.bench.gate.baselines import find
    from specdecode.bench.gate.history import history
    from specdecode.bench.gate.verdicts import judge
    from specdecode.bench.report.captions import judged_by, title
    from specdecode.bench.report.html import section
    from specdecode.bench.report.latex import latex
    from specdecode.bench.report.markdown import markdown
    from specdecode.bench.runs.file import read

    run = read(path)
    own = Path("baselines") / run.header.identity.file
    old = read(baseline) if baseline else find(run.header.identity, Path("baselines"))
    tell: Callable[..., Any] = {Format.md: markdown, Format.html: section, Format.latex: latex}[format]
    judgements = judge(run, old) if old else []
    return title(run), tell(run, title(run), judged_by(run, old, own), judgements, history(own))


def _told_quality(path: Path, margins: Path | None, speed: RunFile | None, format: Format) -> tuple[str, Any]:
    """The same of a run of the quality suite."""
    from specdecode.bench.quality.quality_page import section
    from specdecode.bench.quality.quality_tables import latex, markdown, title
    from specdecode.bench.runs.names import margins_file
    from specdecode.evals.margins import check_margins, read_margins
    from specdecode.evals.results import read

    run = read(path)
    own = Path("baselines") / margins_file(run.header.target, run.header.texts)
    checks = check_margins(run, read_margins(margins or own))
    if format is not Format.html:
        return title(run), (markdown if format is Format.md else latex)(run, checks, speed)
    return title(run), section(run, checks, speed)


def _draw(runs: Mapping[Path, bool], speed: RunFile | None, folder: Path) -> None:
    """Draw each run, and say what was drawn and why other figures were not.

    Args:
        runs: files, and whether they are of the quality suite.
        speed: for these.
        folder: that is drawn into.
    """
    from specdecode.bench.runs.file import read
    from specdecode.evals.results import read as read_quality

    try:
        from specdecode.bench.quality.quality_figures import write as write_quality
        from specdecode.bench.report.figures import write
    except ImportError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install 'specdecode[figures]'") from error
    folders = [folder / run.stem if len(runs) > 1 else folder for run in runs]
    if same := {own.name for own in folders if folders.count(own) > 1}:
        raise ValueError(f"several runs are named {min(same)!r}, and so would be their folders: draw them one by one")
    for (run, of_quality), own in zip(runs.items(), folders, strict=True):
        try:
            missing = write_quality(read_quality(run), own, speed) if of_quality else write(read(run), own)
        except OSError as error:
            raise ValueError(f"{own} cannot be written: {error.strerror}") from None
        also = "" if of_quality else "table1.tex; "
        drawn = ", ".join(name for name in missing if not missing[name])
        typer.echo(f"{own}: {also}as .pdf and .png {drawn}")
        for name, reason in missing.items():
            if reason:
                typer.echo(f"  no {name}: {reason}")
