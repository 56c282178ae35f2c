"""Bisection for the commit that made an arm slow. Each tried commit is measured side by side with the good one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.report.grid import Column, Grid
from specdecode.support.git import commit_id, git

MOST_REPEATS_FACTOR = 4
"""The most growth of the repeats, as a factor, for a commit with an inconclusive verdict."""

_MOST_UNDECIDED = 3
"""The most inconclusive commits among the suspects. Trying more would take long and seldom help."""

_FORMAT = "--format=%h%x00%cs%x00%s"

Measure = Callable[[str, int], Judgement]
"""A function of a commit's id and a number of repeats for each prompt: the gate's judgement of the commit's time."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit: the short id, the date and the first line of the message."""

    id: str
    date: str
    subject: str

    def __str__(self) -> str:
        return f"{self.id} ({self.date}, {self.subject})"


def commits_between(good: str, bad: str, root: Path) -> tuple[Commit, list[Commit]]:
    """Return the good commit, and the commits after it up to the bad one.

    Only first parents are followed, so a merged branch counts as one commit, its merge.

    Raises:
        ValueError: a commit does not exist, or the good one is not an ancestor of the bad one.
    """
    start, end = commit_id(good, root), commit_id(bad, root)
    if start == end:
        raise ValueError(f"{good} and {bad} are the same commit: there is nothing between them")
    try:
        git("merge-base", "--is-ancestor", start, end, root=root)
    except ValueError:
        raise ValueError(f"{good} is no ancestor of {bad}: name a commit that {bad} descends from") from None
    log = git("log", "--first-parent", "--reverse", _FORMAT, f"{start}..{end}", root=root)
    (first,) = _commits(git("log", "--max-count=1", _FORMAT, start, root=root))
    return first, _commits(log)


def _commits(log: str) -> list[Commit]:
    return [Commit(*line.split("\0", 2)) for line in log.strip("\n").split("\n")]


@dataclass(frozen=True, slots=True)
class Trial:
    """The measurement of a commit.

    Attributes:
        repeats: number of repeats of each prompt.
        judgement: the gate's judgement of its time; None if the commit was skipped.
        why_skipped: the reason why the commit was skipped, in a sentence; "" if it was not.
    """

    repeats: int
    judgement: Judgement | None
    why_skipped: str = ""

    @property
    def verdict(self) -> Verdict | None:
        """Return the gate's verdict; None if the commit was skipped."""
        return self.judgement.verdict if self.judgement else None

    def __str__(self) -> str:
        return f"{self.judgement.verdict.value}: {self.judgement.reason}" if self.judgement else self.why_skipped


class Bisection:
    """A search for the first slow commit. Its state is valid at any time, also after an interrupt.

    Args:
        commits: the commits in order; the last one is the bad one.
        repeats: number of repeats of each prompt, at first.

    Attributes:
        trials: the last measurement of each commit, by the commit's index.
        slow: index of the first commit known to be slow; None if no commit is known to be slow.
        fast: index of the last commit known to be fast; -1 for the good one.
    """

    def __init__(self, commits: Sequence[Commit], repeats: int) -> None:
        self.commits = commits
        self.trials: dict[int, Trial] = {}
        self.slow: int | None = None
        self.fast = -1
        self._repeats = repeats
        self._steps = 0

    @property
    def suspects(self) -> list[Commit]:
        """Return the commits that may be the first slow one."""
        last = len(self.commits) - 1 if self.slow is None else self.slow
        return list(self.commits[self.fast + 1 : last + 1])

    @property
    def finished(self) -> bool:
        """Return whether the search is finished: a slow commit is known, and no further commit is worth a try."""
        return self.slow is not None and self._next(self.slow) is None

    def search(self, measure: Measure, tell: Callable[[str], None]) -> None:
        """Search until one suspect is left, or the verdicts on the rest are inconclusive.

        Args:
            measure: see `Measure`.
            tell: called with a line on each step.

        Raises:
            ValueError: the last commit cannot be measured.
        """
        last = len(self.commits) - 1
        self._try(last, measure, tell)
        if why := self.trials[last].why_skipped:
            raise ValueError(f"{self.commits[last].id} cannot be compared: {why}")
        if self.trials[last].verdict is not Verdict.REGRESSED:
            return
        self.slow = last
        while (place := self._next(self.slow)) is not None:
            self._try(place, measure, tell)
            if self.trials[place].verdict is Verdict.REGRESSED:
                self.slow = place
            elif self.trials[place].verdict in (Verdict.PASS, Verdict.IMPROVED):
                self.fast = place

    def _next(self, slow: int) -> int | None:
        """Return the index of the untried suspect nearest to the middle.

        Return None if there is none, or if `_MOST_UNDECIDED` suspects are inconclusive.
        """
        between = range(self.fast + 1, slow)
        untried = [place for place in between if place not in self.trials]
        tried = [self.trials[place] for place in between if place in self.trials]
        if not untried or sum(trial.verdict is Verdict.INCONCLUSIVE for trial in tried) >= _MOST_UNDECIDED:
            return None
        return min(untried, key=lambda place: abs(2 * place - self.fast - slow))

    def _try(self, place: int, measure: Measure, tell: Callable[[str], None]) -> None:
        """Measure a commit. While the verdict is inconclusive, measure it again with twice the repeats."""
        self._steps += 1
        left = max(1, math.ceil(math.log2(len(self.suspects)))) + (self.slow is None)
        tell(f"step {self._steps} of about {self._steps + left - 1}: {self.commits[place]}")
        repeats = self._repeats
        while True:
            trial = self.trials[place] = _trial(self.commits[place].id, repeats, measure)
            tell(f"  {trial if trial.judgement else f'skipped: {trial}'}")
            if trial.verdict is not Verdict.INCONCLUSIVE or repeats >= MOST_REPEATS_FACTOR * self._repeats:
                return
            repeats = min(2 * repeats, MOST_REPEATS_FACTOR * self._repeats)
            tell(f"  again, with {repeats} repeats")


def _trial(commit: str, repeats: int, measure: Measure) -> Trial:
    try:
        judgement = measure(commit, repeats)
    except ValueError as error:
        return Trial(repeats, None, str(error))
    # If the gate compared no times, as with a wrong output, more repeats do not help.
    return Trial(repeats, judgement) if judgement.change else Trial(repeats, None, judgement.reason)


def conclusion(bisection: Bisection, good: Commit, below: float) -> str:
    """Return a sentence on the first commit that is slower than `below` times the good one's speed."""
    bad, slower = bisection.commits[-1], f"slower than {below:g} of the speed of {good.id}"
    first = bisection.trials.get(len(bisection.commits) - 1 if bisection.slow is None else bisection.slow)
    if first is None or first.judgement is None:
        return "Nothing is known yet."
    if bisection.slow is None and first.verdict is Verdict.INCONCLUSIVE:
        return f"The runs can't tell whether {bad} is {slower}: {first.judgement.reason}."
    if bisection.slow is None:
        return f"{bad} is not {slower}: {first.judgement.reason}. There is nothing to find."
    if len(bisection.suspects) == 1:
        return f"{bisection.suspects[0]} is the first that is {slower}: {first.judgement.reason}."
    why = "the runs can't tell which" if bisection.finished else "the search was not finished"
    return f"The first that is {slower} is among {', '.join(commit.id for commit in bisection.suspects)}: {why}."


def measured_commits(bisection: Bisection, good: Commit) -> Grid:
    """Return a table with a row for the good commit, and one for each tried commit in the order of history."""
    columns = [Column(name, figures=False) for name in ("commit", "date", "verdict")]
    columns += [Column("speed over good"), Column("repeats"), Column("what it says", False, True)]
    rows = [[good.id, good.date, "good", "", "", good.subject]]
    for place, trial in sorted(bisection.trials.items()):
        commit, judgement, about = bisection.commits[place], trial.judgement, [bisection.commits[place].subject]
        if judgement is None:
            about.append(trial.why_skipped)
        elif judgement.verdict is Verdict.REGRESSED and judgement.blame:
            about.append(f"mostly {judgement.blame.main}")
        speed = f"{judgement.change:.3f}" if judgement else ""
        verdict = judgement.verdict.value if judgement else "skipped"
        rows.append([commit.id, commit.date, verdict, speed, str(trial.repeats), "; ".join(about)])
    return Grid(columns, rows)
