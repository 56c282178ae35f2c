"""Changes of an arm's speedup between two runs, prompt by prompt and repeat by repeat."""

from __future__ import annotations

import statistics
from collections.abc import Collection

import numpy as np

from specdecode.bench.runs.records import RunFile


def same_text(prompt: str, new: RunFile, old: RunFile) -> bool:
    """Return whether a prompt's id stands for the same text in both runs, as far as both know: older files do not.

    An id is a place in a data set. Data sets that come with Python change with its version.
    """
    ours, theirs = (run.header.prompts.get(prompt) for run in (new, old))
    return ours is None or theirs is None or ours == theirs


def shared_prompts(arm: str, new: RunFile, old: RunFile, over: str) -> list[str]:
    """Return the prompts of equal text on which both runs have speedups of an arm over another."""
    after, before = new.log_speedups(arm, over), old.log_speedups(arm, over)
    return [prompt for prompt in after if prompt in before and same_text(prompt, new, old)]


def changes(arm: str, new: RunFile, old: RunFile, over: str, prompts: Collection[str] | None = None) -> list[float]:
    """Return logarithms of an arm's speedup divided by its speedup in an older run.

    There is one for each repeat of each shared prompt. If one run has more, some of its repeats are averaged.

    Args:
        arm: name of the arm, which both runs have.
        new, old: the runs.
        over: the arm that both speedups are over.
        prompts: other prompts are left out; None for all.
    """
    changed: list[float] = []
    for prompt in shared_prompts(arm, new, old, over):
        if prompts is not None and prompt not in prompts:
            continue
        logs = [_repeated_logs(arm, prompt, run, over) for run in (new, old)]
        if count := min(map(len, logs)):
            after, before = ([statistics.fmean(part) for part in np.array_split(some, count)] for some in logs)
            changed += [now - was for now, was in zip(after, before, strict=True)]
    return changed


def _repeated_logs(arm: str, prompt: str, run: RunFile, over: str) -> list[float]:
    """Return log speedups of an arm over another, one for each repeat with correct outputs of both."""
    logs, others = (run.arms[name].rows[prompt].by_repeat for name in (arm, over))
    return [log - others[repeat] for repeat, log in logs.items() if repeat in others]
