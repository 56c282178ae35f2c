"""The gate: verdicts on whether a run is worse than its baseline."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean, geometric_mean, median
from types import MappingProxyType
from typing import Literal

from specdecode.bench.gate.baselines import TOLERANCE
from specdecode.bench.gate.blame import Blame, blame
from specdecode.bench.gate.history import history
from specdecode.bench.gate.pairs import changes, same_text, shared_prompts
from specdecode.bench.gate.series import MOST_EARLIER_VERSIONS, backend, past_noise, turns, yardstick
from specdecode.bench.runs.counts import as_dict
from specdecode.bench.runs.measures import SIGNS
from specdecode.bench.runs.names import ANY_HARDWARE, PEER_BASELINE
from specdecode.bench.runs.records import Identity, RunFile
from specdecode.bench.runs.statistics import Estimate, detectable_slowdown, typical_ratio

AGAINST_TOLERANCE = 0.02
"""The share by which a time may be worse between versions measured side by side. That detects smaller changes."""

COUNTER_TOLERANCE = 0.02
"""The share by which a counter may become worse. Its only noise are rare ties, which machines decide differently."""


class Verdict(str, enum.Enum):
    """The gate's verdict on one arm, in the order of tables."""

    REGRESSED = "REGRESSED"
    MISSING = "MISSING"
    INCONCLUSIVE = "INCONCLUSIVE"
    NO_BASELINE = "NO_BASELINE"
    WRONG_HARDWARE = "WRONG_HARDWARE"
    NOT_JUDGED = "NOT_JUDGED"
    IMPROVED = "IMPROVED"
    PASS = "PASS"


FAILING = {
    "on": frozenset({Verdict.REGRESSED, Verdict.MISSING}),
    "strict": frozenset(Verdict) - {Verdict.PASS, Verdict.IMPROVED, Verdict.NOT_JUDGED},
    "off": frozenset[Verdict](),
}
"""The verdicts that fail a run, by the gate's setting."""


_TURNS = {
    "": "whole runs",
    "steps": "runs in turns with the reference arm (--until)",
    "versions": "runs beside another commit (--against)",
}
"""What took turns in a run, in words."""


def tolerance_of(tolerance: float | None, default: float) -> float:
    """Return the given tolerance, or the default if it is None.

    Raises:
        ValueError: the tolerance is not from 0 to below 1.
    """
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance}: a share is from 0 to below 1")
    return default if tolerance is None else tolerance


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The share by which a time may be worse, and whether it comes from the arm's history."""

    share: float
    from_history: bool = False

    def __str__(self) -> str:
        return f"{self.share:.1%}, from its own history" if self.from_history else f"{100 * self.share:.3g}%"


@dataclass(frozen=True, slots=True)
class Judgement:
    """One verdict with its reason.

    Attributes:
        arm: name of the arm.
        gate: the judged quantity.
        verdict: the outcome.
        reason: one sentence with the figures.
        change: for a time: new speed over old, with its interval; None if no times were compared.
        blame: for a time: the causes of the change; None for a peer.
        sees: for a time: the smallest slowdown, as a share, that would be REGRESSED nine times out of ten.
    """

    arm: str
    gate: Literal["time", "counters"]
    verdict: Verdict
    reason: str
    change: Estimate | None = None
    blame: Blame | None = None
    sees: float | None = None


def judge_by_baseline(
    new: RunFile,
    old: RunFile,
    tolerance: float = TOLERANCE,
    tolerances: Mapping[str, float] = MappingProxyType({}),
) -> list[Judgement]:
    """Judge a run by a baseline on disk. An arm's tolerance covers its noise between the baseline's versions in git.

    Args:
        new: the run.
        old: the baseline, read from its file.
        tolerance, tolerances: see `judge`.
    """
    return judge(new, old, tolerance, tolerances=tolerances, noise=noise_in_history(old))


def noise_in_history(baseline: RunFile) -> dict[str, float]:
    """Return the noise of each arm between the versions of a baseline on disk that git knows, as shares."""
    versions = history(baseline.path, newest=MOST_EARLIER_VERSIONS + 1).until(baseline)
    return {arm: past_noise(arm, versions) for arm in baseline.arms}


def judge(
    new: RunFile,
    old: RunFile,
    tolerance: float = TOLERANCE,
    side_by_side: Callable[[str], Estimate] | None = None,
    tolerances: Mapping[str, float] = MappingProxyType({}),
    noise: Mapping[str, float] = MappingProxyType({}),
) -> list[Judgement]:
    """Compare a run with its baseline, arm by arm: times if the hardware is equal, and counters in any case. Leave out
    arms that the run's session did not select.

    Args:
        new: the run.
        old: the baseline, or another version's run.
        tolerance: share by which a time may be worse.
        side_by_side: returns an arm's new speed over its old speed, with the interval, if both were measured together.
        tolerances: tolerances by arm, where they differ from `tolerance`.
        noise: noise of an arm's time, as a share. The tolerance is at least this.
    """
    judgements: list[Judgement] = []
    for arm in [*new.arms, *(arm for arm in old.arms if arm not in new.arms)]:
        if arm not in new.arms and arm in new.header.unselected:
            continue
        share, own_noise = tolerances.get(arm, tolerance), noise.get(arm, 0.0)
        allowed = Tolerance(max(share, own_noise), from_history=own_noise > share)
        if incomparable := _incomparable(arm, new, old):
            judgements += incomparable
            continue
        if new.arms[arm].peer:
            reason = "a peer: its time is shown and not judged"
            time = Judgement(arm, "time", Verdict.PASS, reason)
        elif side_by_side is None:
            time = _judge_time(arm, new, old, allowed)
        else:
            prompts = [prompt for prompt in new.arms[arm].rows if prompt in old.arms[arm].rows]
            change = side_by_side(arm)
            cause = blame(new.arms[arm], old.arms[arm], prompts, change.value)
            time = time_judgement(arm, "speed over the other version's", change, allowed, cause)
        judgements += [time, _judge_counters(arm, new, old)]
    return judgements


def judges_times(judgements: Collection[Judgement]) -> bool:
    """Return whether the time of any arm is judged: not without a baseline, or by one whose times are not
    comparable."""
    return any(
        judged.gate == "time" and (judged.change is not None or judged.verdict is Verdict.REGRESSED)
        for judged in judgements
    )


def open_arms(judgements: Collection[Judgement], until: float) -> set[str]:
    """Return the arms whose verdict on time more repeats can decide.

    Args:
        judgements: the judgements of the run so far.
        until: the slowdown, as a share, that the verdicts must detect.
    """
    return {
        judged.arm
        for judged in judgements
        if judged.verdict is Verdict.INCONCLUSIVE
        and judged.change is not None
        and (judged.sees is None or judged.sees > until)
    }


def _incomparable(arm: str, new: RunFile, old: RunFile) -> list[Judgement]:
    """Return the judgements of an arm whose time and counters cannot be compared; none if they can."""
    ours, theirs = new.header.versions.get("weights"), old.header.versions.get("weights")
    identity, other = new.header.identity, old.header.identity
    if arm not in new.arms:
        verdict = Verdict.MISSING
        reason = "the run lacks this arm, and the compared run has it: measure it, or bless a run without it"
    elif arm not in old.arms:
        verdict, reason = Verdict.NO_BASELINE, "the baseline does not have this arm: bless a run that has it"
    elif new.arms[arm].failure:
        verdict, reason = Verdict.REGRESSED, new.arms[arm].failure
    elif old.arms[arm].failure:
        verdict, reason = Verdict.NO_BASELINE, f"the compared run did not decode it: {old.arms[arm].failure}"
    elif wrong := new.arms[arm].bugs:
        verdict, reason = Verdict.REGRESSED, f"{wrong} wrong output(s): its times and counters are void"
    elif wrong := old.arms[arm].bugs:
        verdict = Verdict.NO_BASELINE
        reason = f"the compared run has {wrong} wrong output(s) of it: its times and counters are void"
    elif identity.file.name == other.file.name and identity.models != other.models:
        verdict = Verdict.INCONCLUSIVE
        reason = (
            f"the models are {_named(identity)} and the baseline's {_named(other)}, whose file has the same name:"
            " bless a run with these, or rename a folder"
        )
    elif ours != theirs:
        verdict = Verdict.INCONCLUSIVE
        reason = (
            f"the target's weights are from {ours} and the baseline's from {theirs}: measure the same weights, or bless"
            " a run with these"
        )
    else:
        return []
    return [Judgement(arm, "time", verdict, reason), Judgement(arm, "counters", verdict, reason)]


def _named(identity: Identity) -> str:
    """Return the names of the models in words."""
    return " with ".join(filter(None, identity.models))


def _judge_time(arm: str, new: RunFile, old: RunFile, tolerance: Tolerance) -> Judgement:
    theirs, ours = old.header.identity.hardware, new.header.identity.hardware
    if theirs == ANY_HARDWARE:
        return Judgement(arm, "time", Verdict.NOT_JUDGED, "the baseline was blessed for its counters alone")
    if theirs != ours:
        reason = f"the baseline is from {theirs} and this run from {ours}: their times are not comparable"
        return Judgement(arm, "time", Verdict.WRONG_HARDWARE, reason)
    if other := _other_backend(new, old) or _other_turns(new, old):
        return Judgement(arm, "time", Verdict.INCONCLUSIVE, f"{other}: their times are not comparable")
    over = yardstick(arm, new)
    if over == PEER_BASELINE and over not in new.arms:
        reason = f"other arms are compared with it; its own time is judged only if the preset has the arm {over}"
        return Judgement(arm, "time", Verdict.NOT_JUDGED, reason)
    if yardstick(arm, old) != over:
        reason = f"it is compared with {over}, in the baseline with {yardstick(arm, old)}: bless a run like this one"
        return Judgement(arm, "time", Verdict.INCONCLUSIVE, reason)
    machines = (old, *old.together)
    changed = [changes(arm, new, one, over) for one in machines]
    if not changed[0] or new.header.max_new_tokens != old.header.max_new_tokens:
        reason = (
            f"run and baseline share no times over {over}: measure the same prompts and length{_other_texts(new, old)}"
        )
        return Judgement(arm, "time", Verdict.INCONCLUSIVE, reason)
    compared = [(one, logs) for one, logs in zip(machines, changed, strict=True) if logs]
    here, there = new.floor_over(over), max(one.floor_over(over) for one, _ in compared)
    # Both runs have noise of their own. Differences between machines may not come from the code, so a regression must
    # show against each machine.
    estimates = [typical_ratio(logs, math.hypot(here, one.floor_over(over)), new.tail(arm)) for one, logs in compared]
    change = Estimate(
        geometric_mean(one.value for one in estimates),
        min(one.low for one in estimates),
        max(one.high for one in estimates),
    )
    # Transformers' times in the same blocks tell whether the arm that it is compared with changed itself.
    shared = shared_prompts(arm, new, old, over)
    faster = fmean(median(changes(over, new, one, PEER_BASELINE, shared) or [0.0]) for one, _ in compared)
    cause = blame(new.arms[arm], old.arms[arm], shared, change.value, faster)
    whose = "the baseline's" if len(compared) == 1 else f"those on the baseline's {len(compared)} machines"
    judged = time_judgement(arm, f"speedup over {over} against {whose}", change, tolerance, cause)
    if judged.verdict is not Verdict.INCONCLUSIVE:
        return judged
    noise = f"the A/A floor is {math.expm1(here):.1%} here and {math.expm1(there):.1%} in the baseline"
    return replace(judged, reason=f"{judged.reason}; {noise}")


def _other_backend(new: RunFile, old: RunFile) -> str | None:
    """Return a clause that names the backends of the target's forwards, if they differ."""
    ours, theirs = backend(new), backend(old)
    return None if ours == theirs else f"the baseline ran on the backend {theirs} and this run on {ours}"


def _other_turns(new: RunFile, old: RunFile) -> str | None:
    """Return a clause on what took turns in each run, if it differs."""
    ours, theirs = (_TURNS[turns(run)] for run in (new, old))
    return None if ours == theirs else f"the baseline has {theirs} and this run {ours}"


def time_judgement(
    arm: str,
    what: str,
    change: Estimate,
    tolerance: Tolerance,
    cause: Blame | None = None,
    longer: str = "more prompts or repeats",
) -> Judgement:
    """Judge a change of speed by its whole interval.

    Args:
        arm: name of the arm.
        what: name of the compared quantity, for the reason.
        change: new speed over old.
        tolerance: the share by which the speed may be worse.
        cause: the causes of the change.
        longer: further measurements that would narrow the interval, for the reason.
    """
    sees = detectable_slowdown(change, tolerance.share)
    if change.bounded and change.low:
        reason = f"{what}: {change:.3f}, tolerance {tolerance}, sees slowdowns from {sees:.1%}"
    else:
        reason = f"{what}: {change.value:.3f}, too few runs for an interval, tolerance {tolerance}"
    if change.high < 1 - tolerance.share:
        verdict = Verdict.REGRESSED
    elif change.low > 1 + tolerance.share:
        verdict = Verdict.IMPROVED
    elif change.low >= 1 - tolerance.share:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.INCONCLUSIVE
        reason += f"; measure {longer} to decide"
    if cause is not None and verdict in (Verdict.REGRESSED, Verdict.IMPROVED):
        reason += f"; {cause}"
    return Judgement(arm, "time", verdict, reason, change, cause, sees)


def _judge_counters(arm: str, new: RunFile, old: RunFile) -> Judgement:
    """Compare the measures that do not depend on the clock, on the prompts with equal outputs in both runs."""
    after, before = new.arms[arm], old.arms[arm]
    if after.timed or before.timed:
        reason = "the clock decides its draft lengths, so its counters differ between runs: only its time is judged"
        return Judgement(arm, "counters", Verdict.NOT_JUDGED, reason)
    same = [
        prompt
        for prompt, output in new.outputs_of(arm).items()
        if old.outputs_of(arm).get(prompt) == output and prompt in after.rows and prompt in before.rows
    ]
    if not same:
        return Judgement(arm, "counters", Verdict.INCONCLUSIVE, _why_no_output_is_shared(arm, new, old))
    counters = before.counters(same)
    if _other_backend(new, old):
        # With static shapes, attention reads a few more slots than are filled.
        counters = replace(counters, attended_bytes_per_step=None)
    was, now = as_dict(counters), as_dict(after.counters(same))
    if not _other_backend(new, old) and new.header.identity.hardware == old.header.identity.hardware:
        was, now = was | as_dict(before.counters_run), now | as_dict(after.counters_run)
    if lost := was.keys() - now.keys():
        reason = f"the run does not have the baseline's {', '.join(sorted(lost))}"
        return Judgement(arm, "counters", Verdict.MISSING, reason)
    shared = [name for name in now if name in was]
    moved = {
        f"{name} {was[name]:.4g} -> {now[name]:.4g}": SIGNS[name] * (now[name] - was[name])
        for name in shared
        if abs(now[name] - was[name]) > COUNTER_TOLERANCE * abs(was[name])
    } | _lengths_moved(after.reached(same), before.reached(same))
    return counters_judgement(
        arm, moved, f"{len(shared)} counters within {COUNTER_TOLERANCE:.0%}, on {len(same)} prompt(s)"
    )


def _why_no_output_is_shared(arm: str, new: RunFile, old: RunFile) -> str:
    if new.header.max_new_tokens != old.header.max_new_tokens:
        return "run and baseline share no output: measure the same length"
    if not new.outputs_of(arm).keys() & old.outputs_of(arm).keys():
        return "run and baseline share no output: measure the same prompts"
    reference = new.arms[arm].baseline or new.header.baseline
    reason = f"{reference} writes other tokens than in the baseline, or no prompt has a right output in both runs"
    return f"{reason}{_other_texts(new, old)}"


def _other_texts(new: RunFile, old: RunFile) -> str:
    """Return a clause on prompts with another text in each run, for reasons; "" if there are none."""
    count = sum(not same_text(prompt, new, old) for prompt in new.header.prompts)
    return f"; {count} prompt(s) of the same name have another text there, as from another Python" if count else ""


def counters_judgement(arm: str, moved: Mapping[str, float], unmoved: str) -> Judgement:
    """Judge counters that moved.

    Args:
        arm: name of the arm.
        moved: the gain of each counter that moved, by a text with both values. Losses are negative.
        unmoved: the reason if none moved.
    """
    if not moved:
        return Judgement(arm, "counters", Verdict.PASS, unmoved)
    worse = ", ".join(change for change, gain in moved.items() if gain < 0)
    better = ", ".join(change for change, gain in moved.items() if gain >= 0)
    if not worse:
        return Judgement(arm, "counters", Verdict.IMPROVED, better)
    return Judgement(arm, "counters", Verdict.REGRESSED, f"{worse}; better: {better}" if better else worse)


def _lengths_moved(after: list[float], before: list[float]) -> dict[str, float]:
    """Return the accepted lengths that more or fewer steps reach. One entry names them all, with the sum of changes."""
    pairs = list(zip_longest(after, before, fillvalue=0.0))
    moved = [
        f"{length}: {was:.0%} -> {now:.0%}"
        for length, (now, was) in enumerate(pairs, start=1)
        if abs(now - was) > COUNTER_TOLERANCE
    ]
    if not moved:
        return {}
    return {f"steps that accept at least {', '.join(moved)}": sum(now - was for now, was in pairs)}
