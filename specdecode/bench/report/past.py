"""Tables of a baseline's history: speeds by version, and their changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from specdecode.bench.gate.changes import LEAST_VERSIONS, Change, Course
from specdecode.bench.gate.series import yardstick
from specdecode.bench.report.captions import BLESSED
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.runs.records import RunFile

_ARMS_ABREAST = 5


def speeds_by_version(runs: Sequence[RunFile], courses: Mapping[str, Course]) -> list[Grid]:
    """Return tables with one row for each version. A table has the speedups of at most five arms.

    Args:
        runs: runs of the versions, the oldest first.
        courses: speedups and changes of each arm, by name.
    """
    arms = [arm for arm, course in courses.items() if course.series.logs]
    about = "of a baseline; its row has the speedups in that run"
    heads = [Column("date", False, about=about), Column("commit", False), Column("reason", False, True, BLESSED)]
    grids = []
    for first in range(0, len(arms), _ARMS_ABREAST):
        abreast = arms[first : first + _ARMS_ABREAST]
        speeds = [dict(zip(courses[arm].series.versions, courses[arm].series.logs, strict=True)) for arm in abreast]
        rows = [
            [run.date, run.commit, run.reason]
            + [f"{math.exp(logs[version]):.3f}" if version in logs else "" for logs in speeds]
            for version, run in enumerate(runs)
        ]
        speedups = [Column(f"{arm} over {yardstick(arm, runs[-1])}", True, True) for arm in abreast]
        grids.append(Grid([*heads, *speedups], rows))
    return grids


def changes(runs: Sequence[RunFile], courses: Mapping[str, Course]) -> Grid:
    """Return a table with one row for each change: its arm, size and commit, and its probability by chance."""
    columns = [
        Column("arm", False),
        Column("is", False),
        Column("by", about="change of the speedup, and its 95 % interval"),
        Column("since", False, True, "commit of the change, or the first and the last one of a drift"),
        Column("p", about="probability that chance alone makes such a change in any of the arms"),
    ]
    rows = [
        [arm, "slower" if change.slower else "faster", _size(change), _place(runs, course, change), f"{change.p:.2g}"]
        for arm, course in courses.items()
        for change in course.changes
    ]
    return Grid(columns, rows)


def remarks(courses: Mapping[str, Course]) -> list[str]:
    """Return notes on a table of changes: totals, and the arms without changes."""
    sentences = [
        f"{arm}: {course.total - 1:+.1%} in total." for arm, course in courses.items() if len(course.changes) > 1
    ]
    unchanged = [arm for arm, course in courses.items() if course.long_enough and not course.changes]
    if unchanged:
        sentences.append(f"No change found: {', '.join(unchanged)}.")
    if short := [f"{arm} ({len(course.series.logs)})" for arm, course in courses.items() if not course.long_enough]:
        sentences.append(
            f"Too few versions like the newest to find a change ({LEAST_VERSIONS} at least): {', '.join(short)}."
        )
    return sentences


def _size(change: Change) -> str:
    ratio = change.ratio
    interval = f" [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]" if ratio.bounded else ""
    return f"{ratio.value - 1:+.1%}{interval}"


def _place(runs: Sequence[RunFile], course: Course, change: Change) -> str:
    """Return the commit of a sudden change, or the first and the last commit of a drift."""
    versions = course.series.versions
    first, last = runs[versions[change.start + 1]], runs[versions[change.end]]
    if change.end == change.start + 1:
        return _version(last)
    return f"{_version(first)}, in {change.end - change.start} versions until {_version(last)}"


def _version(run: RunFile) -> str:
    name = " of ".join(filter(None, [run.commit or "an unknown commit", run.date]))
    return f"{name} ({run.reason})" if run.reason else name
