"""A baseline's history in git: each run that was ever blessed for the same identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specdecode.bench.runs.file import parse
from specdecode.bench.runs.records import RunFile
from specdecode.support.git import git


@dataclass(frozen=True, slots=True)
class History:
    """The earlier runs of a baseline, the oldest first.

    Attributes:
        runs: the runs that this version can judge.
        summary: one sentence about their source and the revisions left out; or the reason why there are none.
    """

    runs: list[RunFile]
    summary: str

    def until(self, run: RunFile) -> list[RunFile]:
        """Return the earlier runs and then this run. It replaces the last earlier run if they are equal."""
        known = bool(self.runs) and self.runs[-1].arms == run.arms
        return [*(self.runs[:-1] if known else self.runs), run]


def history(file: Path, newest: int | None = None) -> History:
    """Read the revisions of a baseline's file from git, through renames. Leave out those that cannot be judged.

    Args:
        file: the baseline's file, in its repository.
        newest: largest number of revisions to read, from the newest; all if None.
    """
    # Each revision gives one record: its short hash, and on a separate line the file's path at that revision.
    asked = ("--follow", "--no-merges", "--diff-filter=d", "--name-only", "--format=%x00%h")
    count = () if newest is None else (f"--max-count={newest}",)
    folder = file.parent
    try:
        log = git("log", *asked, *count, "--", file.name, root=folder) if folder.is_dir() else ""
    except ValueError as error:  # no repository, no git, or a folder of another user
        return History([], f"No history of {file}: {error}.")
    if not log:
        return History([], f"No history: git knows no earlier {file}.")
    revisions = [record.strip().split("\n\n") for record in log.split("\0")[1:]]
    runs: list[RunFile] = []
    for revision, path in reversed(revisions):
        try:
            runs.append(parse(git("show", f"{revision}:{path}", root=folder), Path(f"{revision}:{path}")))
        except ValueError:
            continue
    which = "the newest " if len(revisions) == newest else ""
    summary = f"From git, {len(runs)} of {which}{len(revisions)} revisions of {file}."
    if left_out := len(revisions) - len(runs):
        summary += f" Left out: {left_out} of another format, or damaged."
    return History(runs, summary)
