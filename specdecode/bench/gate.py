"""The gate: whether a run is worse than its baseline."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from specdecode.bench.runs import COUNTERS, TOLERANCE, ArmRecord, RunFile, yardstick
from specdecode.bench.stats import mean_ratio

COUNTER_TOLERANCE = 0.02
"""By how much a counter may become worse, as a share: there is no noise but rare ties that machines decide apart."""


class Verdict(str, enum.Enum):
    """What the gate says of one arm."""

    PASS = "PASS"
    REGRESSED = "REGRESSED"
    IMPROVED = "IMPROVED"
    INCONCLUSIVE = "INCONCLUSIVE"
    NO_BASELINE = "NO_BASELINE"
    WRONG_HARDWARE = "WRONG_HARDWARE"
    MISSING = "MISSING"


FAILING = {
    "on": frozenset({Verdict.REGRESSED, Verdict.MISSING}),
    "strict": frozenset(Verdict) - {Verdict.PASS, Verdict.IMPROVED},
    "off": frozenset[Verdict](),
}
"""The verdicts that fail a run, by the gate's setting."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One verdict.

    Attributes:
        arm: its name.
        gate: what was judged.
        verdict: the outcome.
        reason: one sentence with the figures.
    """

    arm: str
    gate: Literal["time", "counters"]
    verdict: Verdict
    reason: str


def judge(
    new: RunFile, old: RunFile, tolerance: float = TOLERANCE, arms: Collection[str] | None = None
) -> list[Judgement]:
    """Compare a run with its baseline, arm by arm: times where the hardware is the same, counters everywhere.

    Args:
        new: the run.
        old: the baseline.
        tolerance: share by which a time may be worse.
        arms: judge only these, of a run that measured a selection; all if None.
    """
    names = [*new.arms, *(arm for arm in old.arms if arm not in new.arms)]
    return [
        judgement for arm in names if arms is None or arm in arms for judgement in _judge_arm(arm, new, old, tolerance)
    ]


def _judge_arm(arm: str, new: RunFile, old: RunFile, tolerance: float) -> list[Judgement]:
    if incomparable := _incomparable(arm, new, old):
        verdict, reason = incomparable
        return [Judgement(arm, "time", verdict, reason), Judgement(arm, "counters", verdict, reason)]
    verdict, reason = _judge_time(arm, new, old, tolerance)
    judgements = [Judgement(arm, "time", verdict, reason)]
    if new.arms[arm].counters or old.arms[arm].counters:
        verdict, reason = _judge_counters(new, old, new.arms[arm], old.arms[arm])
        judgements.append(Judgement(arm, "counters", verdict, reason))
    return judgements


def _incomparable(arm: str, new: RunFile, old: RunFile) -> tuple[Verdict, str] | None:
    """Why neither time nor counters of the arm can be compared, if so."""
    if arm not in new.arms:
        return Verdict.MISSING, "the baseline has this arm and the run does not: measure it, or bless a run without it"
    if arm not in old.arms:
        return Verdict.NO_BASELINE, "the baseline does not have this arm: bless a run that has it"
    ours, theirs = new.header.versions.get("weights"), old.header.versions.get("weights")
    if ours != theirs:
        return Verdict.INCONCLUSIVE, f"the target's weights are from {ours} and the baseline's from {theirs}"
    return None


def _judge_time(arm: str, new: RunFile, old: RunFile, tolerance: float) -> tuple[Verdict, str]:
    theirs, ours = old.header.identity.hardware, new.header.identity.hardware
    if theirs != ours:
        return Verdict.WRONG_HARDWARE, f"the baseline is of {theirs} and this is {ours}: its times say nothing here"
    before, after = old.arms[arm].log_speedups, new.arms[arm].log_speedups
    shared = [prompt for prompt in new.header.prompts if prompt in before and prompt in after]
    if not shared or new.header.max_new_tokens != old.header.max_new_tokens:
        return Verdict.INCONCLUSIVE, (
            f"run and baseline share no times over {yardstick(arm)}: measure the same prompts and length"
        )
    # Both runs carry noise of their own.
    floor = math.hypot(new.header.floor, old.header.floor)
    change = mean_ratio([[after[prompt] - before[prompt]] for prompt in shared], floor)
    reason = (
        f"speedup over {yardstick(arm)} times {change} against the baseline, tolerance {tolerance:.0%},"
        f" {len(shared)} prompts"
    )
    if change.high < 1 - tolerance:
        return Verdict.REGRESSED, reason
    if change.low > 1 + tolerance:
        return Verdict.IMPROVED, reason
    if change.low >= 1 - tolerance:
        return Verdict.PASS, reason
    return Verdict.INCONCLUSIVE, reason + "; more prompts or repeats would tell"


def _judge_counters(new: RunFile, old: RunFile, after: ArmRecord, before: ArmRecord) -> tuple[Verdict, str]:
    if new.header.prompts != old.header.prompts or new.header.max_new_tokens != old.header.max_new_tokens:
        return Verdict.INCONCLUSIVE, "run and baseline are of other prompts or another length"
    if lost := before.counters.keys() - after.counters.keys():
        return Verdict.MISSING, f"the run does not have the baseline's {', '.join(sorted(lost))}"
    changes = {
        name: (before.counters[name], value, COUNTERS[name] * (value - before.counters[name]))
        for name, value in after.counters.items()
        if name in before.counters
    }
    moved = {name: change for name, (was, _, change) in changes.items() if abs(change) > COUNTER_TOLERANCE * abs(was)}
    if not moved:
        return Verdict.PASS, f"{len(changes)} counters within {COUNTER_TOLERANCE:.0%} of the baseline"
    told = ", ".join(f"{name} {changes[name][0]:.4g} -> {changes[name][1]:.4g}" for name in moved)
    return (Verdict.REGRESSED if min(moved.values()) < 0 else Verdict.IMPROVED), told
