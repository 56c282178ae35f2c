"""Recommendations among the arms of servers, for each concurrency."""

from __future__ import annotations

from collections.abc import Sequence

from specdecode.bench.report.contest import Contest, Recommendation
from specdecode.bench.report.palette import base_name, concurrency
from specdecode.bench.runs.records import RunFile

_SERVED = " A server decodes it, not this package, so its code is an entry of a preset."


def for_servers(run: RunFile, arms: Sequence[str]) -> list[Recommendation]:
    """Recommend the fastest arm for each concurrency.

    Args:
        run: run of the arms.
        arms: arms of servers that may be recommended.
    """
    by_number: dict[int, list[str]] = {}
    for arm in arms:
        by_number.setdefault(concurrency(run, arm), []).append(arm)
    return [advice for number, together in sorted(by_number.items()) for advice in _at(run, number, together)]


def _at(run: RunFile, number: int, arms: list[str]) -> list[Recommendation]:
    """Recommend the fastest lossless arm of a concurrency, and a lossy arm if it is faster still."""
    lossless = [arm for arm in arms if not run.arms[arm].lossy]
    plains = [arm for arm in lossless if _is_plain(run, arm, arms)]
    contest = Contest(run, arms, plain="")
    if plains:
        contest = Contest(run, arms, plain=contest.best(plains))
    aim = f"highest throughput of servers, {number} prompt{'s' if number > 1 else ''} at a time"
    recommendations = []
    faster = [
        arm for arm in lossless if arm not in plains and all(contest.over(arm, other).low > 1.0 for other in plains)
    ]
    if chosen := faster or plains:
        arm = contest.best(chosen)
        recommendations.append(contest.recommendation(aim, arm, _reason(arm, arms, plains), lossless))
    lossy = [arm for arm in arms if arm not in lossless]
    than = [advice.arm for advice in recommendations if advice.arm is not None]
    if faster := [arm for arm in lossy if all(contest.over(arm, other).low > 1.0 for other in (*than, *plains))]:
        reason = (
            f"{f'Faster than {than[0]} beyond the noise' if than else 'The fastest'}, but may write a different text."
        )
        aim = f"{aim}, if loss is acceptable"
        recommendations.append(contest.recommendation(aim, contest.best(faster), reason + _SERVED, [*than, *lossy]))
    return recommendations


def _is_plain(run: RunFile, arm: str, arms: Sequence[str]) -> bool:
    """Return whether the arm decodes plainly: the run's reference arm at this concurrency, or another arm's.

    The reference arm of another arm counts only if its own reference arm is not among `arms`.
    """
    is_baseline = any(run.baseline_of(other) == arm for other in arms) and run.baseline_of(arm) not in arms
    return is_baseline or base_name(run, arm) == base_name(run, run.header.baseline)


def _reason(arm: str, arms: Sequence[str], plains: Sequence[str]) -> str:
    if not plains:
        reason = "No other arm is found to beat it; plain decoding was not measured at this concurrency."
    elif arm in plains:
        reason = (
            "Nothing is faster than plain decoding beyond the noise."
            if len(arms) > 1
            else "There is no other arm to compare it with."
        )
    else:
        reason = f"Faster than {' and '.join(plains)} beyond the noise, and no other such arm is found to beat it."
    return reason + _SERVED
