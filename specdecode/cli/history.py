"""`specdecode history`: show the baselines' past speeds, and find their changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdecode.cli.output import Faults, say, say_tables

if TYPE_CHECKING:
    from specdecode.bench.runs.records import RunFile


def history(
    baseline: Annotated[
        Path | None, typer.Argument(help="file of a baseline  [default: all in the folder of the baselines]")
    ] = None,
    arm: Annotated[str | None, typer.Option("--arm", "-k", help="show this arm alone  [default: all]")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="exit with 1 only for slowdowns after this commit  [default: all]"),
    ] = None,
) -> None:
    """Show the speedups of all versions of a baseline in git, and find where an arm became slower or faster: at one
    commit, or in steps too small for the gate. Exit code 0: no arm became slower; 1: an arm did; 2: a file cannot be
    judged."""
    from specdecode.bench.gate.baselines import all_of
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.runs.file import read
    from specdecode.support.git import commit_id, git

    newer = None
    if since is not None:
        newer = git("rev-list", f"{commit_id(since)}..HEAD").split()
    files = [baseline] if baseline is not None else all_of(read_project(Path()).baselines)
    faults, slower = Faults(), False
    newest: list[RunFile] = []
    for file in files:
        with faults.noted():
            newest.append(read(file))
    for run in [run for run in newest if arm is None or arm in run.arms] or newest:
        with faults.noted():
            slower |= _show(run, arm, newer)
    if faults.sentences or slower:
        raise typer.Exit(2 if faults.sentences else 1)


def _show(newest: RunFile, arm: str | None, newer: Sequence[str] | None) -> bool:
    """Show the past of one baseline, and return whether an arm became slower in it.

    Args:
        newest: the baseline.
        arm: the only arm to show; None for all.
        newer: ids of the commits whose slowdowns count; None for all.
    """
    from specdecode.bench.gate import history
    from specdecode.bench.gate.changes import MOST_VERSIONS, courses
    from specdecode.bench.report.grid import rich_table
    from specdecode.bench.report.past import changes, remarks, speeds_by_version

    past = history.history(newest.path, newest=MOST_VERSIONS)
    runs = past.until(newest)[-MOST_VERSIONS:]
    by_arm = courses(runs, arm)
    say(f"{newest.path}\n{past.summary}")
    say_tables(*map(rich_table, speeds_by_version(runs, by_arm)))
    if (changed := changes(runs, by_arm)).rows:
        say_tables(rich_table(changed))
    say("\n".join(remarks(by_arm)))
    commits = [
        runs[course.series.versions[change.end]].commit
        for course in by_arm.values()
        for change in course.changes
        if change.slower
    ]
    # Run files shorten the ids of commits.
    return any(newer is None or (commit and any(one.startswith(commit) for one in newer)) for commit in commits)
