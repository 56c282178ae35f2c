"""`specdecode gate` and `specdecode bless`: judge a run, and make a run the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdecode.cli.output import say, say_tables
from specdecode.cli.prompts import whole_text


def gate(
    new: Annotated[Path, typer.Argument(help="run file, from pytest --benchmark --benchmark-json")],
    old: Annotated[Path, typer.Argument(help="run file to compare with")],
    strict: Annotated[
        bool, typer.Option("--strict", help="fail on every verdict but PASS, IMPROVED and NOT_JUDGED")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(help="share by which a time may be worse  [default: that of the new run's session]"),
    ] = None,
) -> None:
    """Judge a run by another run, from the files alone. Exit code 0: passed; 1: failed; 2: a file cannot be judged."""
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.gate.verdicts import FAILING, judge_by_baseline, tolerance_of
    from specdecode.bench.report.grid import rich_table
    from specdecode.bench.report.tables import verdicts
    from specdecode.bench.runs.file import read

    project = read_project(Path())
    run = read(new)
    tolerance = tolerance_of(tolerance, project.tolerance(run.header))
    judgements = judge_by_baseline(run, read(old), tolerance, tolerances=project.tolerances)
    say_tables(rich_table(verdicts(judgements)))
    failing = FAILING["strict" if strict else project.gate]
    failed = sum(judgement.verdict in failing for judgement in judgements)
    say(f"{failed} of {len(judgements)} verdicts fail" if failed else f"{len(judgements)} verdicts, none fails")
    if failed:
        raise typer.Exit(1)


def bless(
    run: Annotated[
        list[Path],
        typer.Argument(
            help="run file, from pytest --benchmark --benchmark-json; also runs on other machines of the same hardware"
        ),
    ],
    reason: Annotated[str, typer.Option(help="why later runs are to be judged by this run")],
    baselines: Annotated[
        Path | None, typer.Option(help="folder of the baselines  [default: as pyproject.toml says, or baselines]")
    ] = None,
    counters: Annotated[
        bool, typer.Option("--counters", help="judge only counters by it, on any hardware: the times may be noisy")
    ] = False,
) -> None:
    """Make a run the baseline of its hardware, models, type and preset."""
    from specdecode.bench.gate.baselines import bless as make_baseline
    from specdecode.bench.gate.baselines import ever_sees
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.runs.file import read

    project = read_project(Path())
    baselines = baselines or project.baselines
    file = make_baseline(run, baselines, whole_text(reason, "the reason"), counters=counters)
    if counters:
        say(f"blessed as {file}: it judges counters on any hardware, and no times")
    else:
        blessed = read(file)
        tolerance = project.tolerance(blessed.header)
        say(
            f"blessed as {file}: with it, a later run of the same tolerance ({tolerance:.0%}) detects slowdowns of"
            f" {ever_sees(blessed, tolerance):.1%} or more at best"
        )
