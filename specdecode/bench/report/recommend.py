"""Recommendations from a run: a configuration for each aim, with its reason in figures and its code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from specdecode.bench.arms.entry import drafter_kinds
from specdecode.bench.report.captions import drafts
from specdecode.bench.report.contest import LEAST_PROMPTS, Contest, Recommendation, evidence, plain_arm
from specdecode.bench.report.recommend_servers import for_servers
from specdecode.bench.runs.counts import ratio
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile

HALF = 0.5
"""A balanced arm holds at most this share of plain decoding's keys and values."""

NEAR = 0.01
"""Arms whose memory differs by less than this share of plain decoding's are ranked by speed."""

_LEAST_TO_DROP = 3


@dataclass(frozen=True, slots=True)
class Advice:
    """All recommendations of a run.

    Attributes:
        recommendations: one for each aim, and for each acceptance if it was set.
        left_out: reason for each excluded arm, by name.
        notes: notes needed to read the recommendations.
    """

    recommendations: list[Recommendation]
    left_out: dict[str, str]
    notes: list[str]


def recommend(run: RunFile, left_out: Mapping[str, str] | None = None) -> Advice:
    """Choose an arm for each aim, or plain decoding if no arm is shown to be better.

    The best of many arms looks better than it is, because the same prompts choose and judge it. So with k arms, the
    k - 1 intervals hold simultaneously (`simultaneous_ratio`). This suffices for any chosen arm. While the bounds on
    the truly best arm over each other arm hold, no arm is found to beat it (multiple comparisons with the best, Hsu
    1984). While the bounds over plain decoding hold, no arm is wrongly found to beat plain decoding.

    Looping texts are easy to predict and thus no evidence for drafts, so they do not count for drafting arms.

    Arms of servers are compared only with arms of the same concurrency, and never with arms of this package.

    Args:
        run: the run, whose arms have their preset entries.
        left_out: reasons for arms that are not in the run, by name.

    Raises:
        ValueError: the file is an older one without the arms' entries, or has no times of plain decoding.
    """
    plain = plain_arm(run)
    if plain not in run.arms or not run.arms[plain].rows:
        raise ValueError(f"{run.path} has no times of {plain}, which all arms are compared with: measure it again")
    if len(run.arms) > 1 and not any(record.options for arm, record in run.arms.items() if arm != plain):
        raise ValueError(f"{run.path} is of an older version, without the settings of its arms: measure it again")
    arms, why = _contestants(run)
    servers = [arm for arm in arms if "server" in run.arms[arm].options]
    advice = for_servers(run, servers)
    if plain not in servers:
        advice = _for_package(run, [arm for arm in arms if arm not in servers]) + advice
    return Advice(advice, {**(left_out or {}), **why}, _notes(run))


def _for_package(run: RunFile, arms: list[str]) -> list[Recommendation]:
    """Choose an arm of this package for each aim, and for each acceptance if it was set."""
    records = run.arms.values()
    known = {level for record in records if isinstance(level := record.options.get("replay"), float | int)}
    recommendations = []
    for level in sorted(known) if run.arms[BASELINE].synthetic and known else [None]:
        contest = Contest(run, [arm for arm in arms if run.arms[arm].options.get("replay") in (None, level)], level)
        fastest = _lossless(contest)
        recommendations.append(_throughput(contest, fastest))
        recommendations += [lossy] if (lossy := _throughput_with_loss(contest, fastest)) else []
        recommendations += [_memory(contest), _balanced(contest, fastest), _long_context(contest)]
    return recommendations


def is_hopeless(run: RunFile, arm: str) -> bool:
    """Return whether the arm will hardly be recommended, even after more prompts.

    That is true after a failure or a wrong output, or if a few prompts show that it is slower than plain decoding. Slow
    arms of servers or with a bounded cache are kept: they may be recommended for their concurrency or their memory.
    """
    arms, _ = _contestants(run)
    record = run.arms[arm]
    if record.faulty or arm not in arms or {"policy", "server"} & record.options.keys():
        return record.faulty
    ours = [other for other in arms if "server" not in run.arms[other].options]
    return len(record.rows) >= _LEAST_TO_DROP and Contest(run, ours).over(arm, BASELINE).high < 1.0


def _contestants(run: RunFile) -> tuple[list[str], dict[str, str]]:
    """Return the arms that may be recommended, and for other arms except peers the reason why not."""
    left_out, plain = {}, plain_arm(run)
    for arm, record in run.arms.items():
        if record.peer or arm == plain:
            continue
        counted = len(evidence(run, arm))
        if record.bugs:
            left_out[arm] = f"{record.bugs} wrong output(s)"
        elif record.failure:
            left_out[arm] = record.failure
        elif "call" in record.options:
            left_out[arm] = "it is decoded by code outside of this package"
        elif "server" in run.arms[plain].options and "server" not in record.options:
            left_out[arm] = (
                f"a server decodes {plain}, so the run does not show whether this arm is faster than plain decoding"
            )
        elif record.options.get("batch", 1) != 1:
            left_out[arm] = "it decodes several prompts at once, and recommendations are for one prompt at a time"
        elif "replay" in record.options and not run.arms[plain].synthetic:
            left_out[arm] = "its acceptance was set, not measured"
        elif record.synthetic and drafts(record) and "replay" not in record.options:
            left_out[arm] = "the weights are random, so its acceptance says nothing"
        elif counted < LEAST_PROMPTS:
            loops = len(record.rows) - counted
            why = f"{loops} of its {len(record.rows)} text(s) loop, which is no evidence for drafts; " if loops else ""
            left_out[arm] = f"{why}{counted} prompt(s) are too few: measure more"
    return [arm for arm, record in run.arms.items() if arm not in left_out and not record.peer], left_out


def _lossless(contest: Contest) -> str:
    """Choose the lossless arm for throughput: one that beats plain decoding, or plain decoding itself."""
    faster = [arm for arm in contest.lossless if contest.over(arm, BASELINE).low > 1.0]
    return contest.best(faster or [BASELINE])


def _throughput(contest: Contest, arm: str) -> Recommendation:
    reason = "Lossless, faster than plain decoding beyond the noise, and the simplest such arm that no other beats."
    if arm == BASELINE:
        reason = "No lossless arm is faster than plain decoding beyond the noise: draft nothing."
    if contest.lossless == [BASELINE]:
        reason = "There is no other lossless arm to compare it with."
    if better := [peer for peer in contest.peers if contest.over(peer, arm).low > 1.0]:
        reason += f" Transformers is faster: {', '.join(f'{peer}, {contest.over(peer, arm)}' for peer in better)}."
    return contest.recommendation("highest throughput", arm, reason, contest.lossless)


def _throughput_with_loss(contest: Contest, lossless: str) -> Recommendation | None:
    """Recommend a lossy arm that is faster than the lossless choice; None if there is none."""
    lossy = [arm for arm in contest.arms if arm not in contest.lossless]
    faster = [arm for arm in lossy if min(contest.over(arm, than).low for than in (lossless, BASELINE)) > 1.0]
    if not faster:
        return None
    reason = f"Faster than {lossless} beyond the noise, but it writes a different text."
    aim = "highest throughput, if loss is acceptable"
    return contest.recommendation(aim, contest.best(faster), reason, [lossless, *lossy])


def _memory(contest: Contest) -> Recommendation:
    """Recommend the arm with the least memory for weights and KV.

    Arms whose draft has memory of its own come last, because the run does not record that memory.
    """
    plain, noise = contest.memory(BASELINE), f"within {math.expm1(contest.slack):.1%}"
    aim = "memory-bound"
    if math.isnan(plain):
        reason = "The run does not record the memory of weights and KV: measure it again."
        return Recommendation(aim, None, reason, assumed=contest.assumed)
    no_slower = contest.no_slower()
    saving = [arm for arm in no_slower if contest.memory(arm) < (1 - NEAR) * plain]
    saving = [arm for arm in saving if not _draft_takes(contest.run.arms[arm])] or saving
    if not saving:
        reason = (
            f"No arm as fast as plain decoding ({noise}) saves {NEAR:.0%} of its {plain / 1e6:.1f} MB of weights and"
            " KV."
        )
        return contest.recommendation(aim, BASELINE, reason, [BASELINE])
    least = min(map(contest.memory, saving))
    near = [arm for arm in saving if contest.memory(arm) <= least + NEAR * plain]
    arm = contest.best(near)
    saved = plain - contest.memory(arm)
    reason = (
        f"Holds {contest.memory(arm) / 1e6:.1f} MB of weights and KV, {saved / 1e6:.1f} MB or {saved / plain:.0%} less"
        f" than plain decoding, and on average is no slower ({noise})."
        f"{_draft_takes(contest.run.arms[arm])}"
    )
    return contest.recommendation(aim, arm, reason, near)


def _balanced(contest: Contest, fastest: str) -> Recommendation:
    aim, share = "balanced", f"{HALF:.0%} of plain decoding's KV at most"
    plain = contest.cache(BASELINE)
    small = [arm for arm in contest.no_slower() if contest.cache(arm) <= HALF * plain]
    if not small:
        reason = f"No arm as fast as plain decoding holds {share}, so speed alone decides."
        return contest.recommendation(aim, fastest, reason, [fastest])
    arm = contest.best(small)
    reason = (
        f"Holds {share}, is no slower, and is the simplest such arm that no other beats: {contest.cache(arm) / 1e6:.1f}"
        f" MB instead of {plain / 1e6:.1f}.{_draft_takes(contest.run.arms[arm])}"
    )
    return contest.recommendation(aim, arm, reason, small)


def _long_context(contest: Contest) -> Recommendation:
    """Recommend the best of the bounded caches that were full at the run's longest length."""
    run, length = contest.run, contest.run.header.max_new_tokens
    aim = "long context"
    bounded = [arm for arm in contest.arms if (run.arms[arm].counts().compressions or 0) > 0]
    if not bounded:
        reason = (
            f"No bounded cache was full at {length} tokens on enough prompts: measure a preset with bounded caches,"
            " such as long-sequence, more prompts, or a larger --max-new-tokens."
        )
        return Recommendation(aim, None, reason, assumed=contest.assumed)
    arm = contest.best(bounded)
    sizes = {at: run.at(at).arms[arm].counters().peak_cache_bytes for at in run.lengths}
    known = ", ".join(f"{size / 1e6:.1f} MB at {at}" for at, size in sizes.items() if size is not None)
    plain = run.arms[BASELINE].counts()
    grown = ratio(plain.grown_bytes, plain.tokens)
    growth = "" if grown is None else f", and grows by {1e3 * grown / 1e6:.1f} MB per thousand tokens"
    reason = (
        f"Its KV does not grow with the text: {known} tokens; plain decoding's KV is"
        f" {contest.cache(BASELINE) / 1e6:.1f} MB at {length}{growth}.{_draft_takes(run.arms[arm])}"
    )
    return contest.recommendation(aim, arm, reason, bounded)


def _draft_takes(record: ArmRecord) -> str:
    """Return a sentence about memory of the draft that the figures leave out; empty if there is none."""
    takes = {**dict.fromkeys(("head", "mtp", "medusa", "model", "universal"), "weights and KV"), "self-streaming": "KV"}
    what = next((takes[kind] for kind in drafter_kinds(record.options) if kind in takes), None)
    return f" The draft's own {what} come on top: the run does not record them." if what else ""


def _notes(run: RunFile) -> list[str]:
    notes = [
        "Intervals hold for all compared arms together (95 %, Student's t, Bonferroni), so they hold for the chosen"
        " arm, and are wider than the report's. None is narrower than the A/A floor,"
        f" {math.expm1(run.header.floor):.1%}."
    ]
    if run.arms[plain_arm(run)].synthetic:
        notes.append(
            "The weights are random: all recommendations are hypothetical, and hold if drafts are accepted as often as"
            " was set. The quality of a lossy arm's text is unknown."
        )
    return notes + [f"Beware: {warning}." for warning in run.header.warnings]
