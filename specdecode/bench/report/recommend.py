"""What to use: from a run to a configuration for each aim, with its reason in figures and the code that makes it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from specdecode.bench.arms.entry import drafter_kinds
from specdecode.bench.arms.snippet import code_snippet
from specdecode.bench.gate.baselines import TOLERANCE
from specdecode.bench.report.captions import LOOPS, cells, drafts
from specdecode.bench.runs.counts import ratio
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, Row, RunFile
from specdecode.bench.runs.statistics import Estimate, simultaneous_ratio

HALF = 0.5
"""The share of plain decoding's keys and values that an arm may hold to be called balanced."""

NEAR = 0.01
"""Arms whose memory differs by less than this share of plain decoding's are chosen between by their speed."""

_LEAST_PROMPTS = 2
_LEAST_TO_DROP = 3
# From the simplest on: what has to be loaded, tuned and understood.
_DRAFTERS = ("none", "lookup", "self-streaming", "head", "model", "universal")
_SHAPES = ("chain", "static", "best-first")
_CONTROLLERS = ("fixed", "adaptive", "cost-aware")


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to use for one aim.

    Attributes:
        aim: in words.
        arm: its name; None where the run cannot tell.
        reason: sentences.
        over: its speed over that of `ar` and of each of transformers' arms.
        beats: its speed over that of each arm that it is faster than beyond the interval.
        tied: the speed over its own of the others that the aim allows: it is not told apart from these.
        settle: what would tell them apart.
        assumed: the share of the proposals whose acceptance was set, if it was.
        code: lines of Python.
    """

    aim: str
    arm: str | None
    reason: str
    over: dict[str, Estimate] = field(default_factory=dict)
    beats: dict[str, Estimate] = field(default_factory=dict)
    tied: dict[str, Estimate] = field(default_factory=dict)
    settle: str = ""
    assumed: float | None = None
    code: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """All that a run recommends.

    Attributes:
        recommendations: by aim, and by acceptance if that was set.
        left_out: why an arm was not looked at, by its name.
        notes: what must be known to read the rest.
    """

    recommendations: list[Recommendation]
    left_out: dict[str, str]
    notes: list[str]


def recommend(run: RunFile, left_out: Mapping[str, str] | None = None) -> Advice:
    """Choose an arm for each aim; plain decoding where nothing is shown to be better.

    The best of many arms, chosen by the same prompts that it is told by, looks better than it is. So among k arms every
    interval is made as one of k - 1 that hold together (`simultaneous_ratio`). That is enough for all pairs, and for
    whichever arm is chosen: where the bounds on what the truly best arm is over each of the others hold, none is
    found to beat it (multiple comparisons with the best, Hsu 1984), and where those on what the others are over plain
    decoding hold, nothing is found to beat it that does not.

    A text that loops is no evidence for a draft that predicts it, so such prompts do not count for arms that draft.

    Args:
        run: to look at, its arms with the options that they were made of.
        left_out: arms that are not in the run, and why.

    Raises:
        ValueError: an older file, which does not tell how its arms are made; or one without plain decoding.
    """
    records = run.arms.values()
    if BASELINE not in run.arms or not run.arms[BASELINE].rows:
        raise ValueError(f"{run.path} has no times of {BASELINE}, with which all else is compared: measure it again")
    if len(run.arms) > 1 and not any(record.options for arm, record in run.arms.items() if arm != BASELINE):
        raise ValueError(f"{run.path} does not tell how its arms are made, as older versions did not: measure it again")
    arms, why = _contestants(run)
    known = {level for record in records if isinstance(level := record.options.get("replay"), float | int)}
    recommendations = []
    for level in sorted(known) if run.arms[BASELINE].synthetic and known else [None]:
        contest = _Contest(run, [arm for arm in arms if run.arms[arm].options.get("replay") in (None, level)], level)
        fastest = _lossless(contest)
        recommendations.append(_throughput(contest, fastest))
        recommendations += [lossy] if (lossy := _throughput_with_loss(contest, fastest)) else []
        recommendations += [_memory(contest), _balanced(contest, fastest), _long_context(contest)]
    return Advice(recommendations, {**(left_out or {}), **why}, _notes(run))


def is_hopeless(run: RunFile, arm: str) -> bool:
    """Return whether more prompts can hardly bring the arm into a recommendation.

    That is after a wrong output, or once it is slower than plain decoding beyond the interval on a few prompts. A
    bounded cache is recommended for other things than speed.
    """
    arms, _ = _contestants(run)
    record = run.arms[arm]
    if record.failure or record.bugs or arm not in arms or "policy" in record.options:
        return bool(record.failure or record.bugs)
    return len(record.rows) >= _LEAST_TO_DROP and _Contest(run, arms).over(arm, BASELINE).high < 1.0


def _contestants(run: RunFile) -> tuple[list[str], dict[str, str]]:
    """Return the arms that may be recommended, and why others of our own may not."""
    left_out = {}
    for arm, record in run.arms.items():
        if record.peer or arm == BASELINE:
            continue
        counted = len(_evidence(run, arm))
        if record.bugs:
            left_out[arm] = f"{record.bugs} wrong output(s)"
        elif record.failure:
            left_out[arm] = record.failure
        elif "call" in record.options:
            left_out[arm] = "it is decoded by code outside of this package"
        elif record.options.get("batch", 1) != 1:
            left_out[arm] = "it decodes several prompts at once, and here one is decoded"
        elif "replay" in record.options and not run.arms[BASELINE].synthetic:
            left_out[arm] = "its acceptance was set and not found out"
        elif record.synthetic and drafts(record) and "replay" not in record.options:
            left_out[arm] = "the weights are random, so what it accepts says nothing"
        elif counted < _LEAST_PROMPTS:
            loops = len(record.rows) - counted
            why = f"{loops} of its {len(record.rows)} text(s) loop, which is no evidence for drafts; " if loops else ""
            left_out[arm] = f"{why}{counted} prompt(s) say nothing of others: measure more"
    return [arm for arm, record in run.arms.items() if arm not in left_out and not record.peer], left_out


def _loops(row: Row) -> bool:
    return (ratio(row.counts.repeated, row.counts.ngrams) or 0.0) >= LOOPS


def _evidence(run: RunFile, arm: str) -> dict[str, float]:
    """Return log speedups over `ar` by prompt, without those of a draft that was good at repeating."""
    record = run.arms[arm]
    # Of the peers it is not known, but for their plain decoding. What is replayed is accepted as often anywhere.
    drafting = drafts(record) or record.options.get("peer", "generate") != "generate"
    matters = drafting and not record.synthetic
    logs = run.log_speedups(arm)
    return {prompt: log for prompt, log in logs.items() if not (matters and _loops(record.rows[prompt]))}


@dataclass(frozen=True, slots=True)
class _Contest:
    """Arms that are compared with each other, `ar` among them; and the acceptance that was set for all that draft."""

    run: RunFile
    arms: list[str]
    assumed: float | None = None

    @property
    def peers(self) -> list[str]:
        return [arm for arm, record in self.run.arms.items() if record.peer]

    @property
    def lossless(self) -> list[str]:
        return [arm for arm in self.arms if not self.run.arms[arm].lossy]

    @property
    def comparisons(self) -> int:
        return max(1, len(self.arms) - 1)

    def logs(self, arm: str, other: str) -> list[float]:
        """Return log speedups of one over the other, prompt by prompt, where both are evidence."""
        logs, others = _evidence(self.run, arm), _evidence(self.run, other)
        return [logs[prompt] - others[prompt] for prompt in logs if prompt in others]

    def over(self, arm: str, other: str) -> Estimate:
        """Return the speed of one over the other's."""
        if arm == other:
            return Estimate(1.0, 1.0, 1.0)
        if not (logs := self.logs(arm, other)):
            return Estimate(math.nan, 0.0, math.inf)
        return simultaneous_ratio(logs, self.comparisons, self.run.header.floor)

    def speed(self, arm: str) -> float:
        """Return the mean log speedup over `ar`."""
        return statistics.fmean(_evidence(self.run, arm).values())

    def best(self, arms: Sequence[str]) -> str:
        """Return the simplest of the arms that none is found to beat: lossless before lossy, of a kind the fastest."""
        unbeaten = [arm for arm in arms if all(self.over(other, arm).low <= 1.0 for other in arms)]
        return min(unbeaten, key=lambda arm: (_effort(self.run.arms[arm]), -self.speed(arm)))

    def no_slower(self) -> list[str]:
        """Return the arms that in the mean are slower than plain decoding by `slack` at most.

        An arm of whose speed too little is known for an interval is not among them.
        """
        known = [arm for arm in self.arms if math.isfinite(self.over(arm, BASELINE).high)]
        return [arm for arm in known if self.speed(arm) >= -self.slack]

    @property
    def slack(self) -> float:
        """Return what two runs of the same code may differ by, in logarithms; at most what the gate lets pass."""
        return min(self.run.header.floor, math.log1p(TOLERANCE))

    def cache(self, arm: str) -> float:
        """Return the most bytes of keys and values, in the mean of the prompts; nan if they are not known."""
        size = self.run.arms[arm].counters().peak_cache_bytes
        return math.nan if size is None else size

    def memory(self, arm: str) -> float:
        """Return the same with the target's weights."""
        weights = self.run.arms[arm].counters_run.weight_bytes
        return math.nan if weights is None else weights + self.cache(arm)

    def recommendation(self, aim: str, arm: str, reason: str, allowed: Collection[str]) -> Recommendation:
        """Recommend the arm, with what it beats of the arms that the aim allows, and what it is not told apart from."""
        record = self.run.arms[arm]
        yardsticks = [other for other in (BASELINE, *self.peers) if other != arm and self.logs(arm, other)]
        over = {other: self.over(arm, other) for other in yardsticks}
        if record.lossy:
            reason += f" Of its tokens {''.join(cells(self.run, arm, ['agreement']))} come before it leaves ar's text."
        if not_counted := len(record.rows) - len(_evidence(self.run, arm)):
            reason += f" {not_counted} of its {len(record.rows)} texts loop, and are not counted."
        ratios = {other: self.over(arm, other) for other in allowed if other != arm}
        beats = {other: ratio for other, ratio in ratios.items() if ratio.low > 1.0}
        tied = {other: self.over(other, arm) for other in ratios if other not in beats}
        snippet = code_snippet(self.run, arm)
        return Recommendation(aim, arm, reason, over, beats, tied, self._settle(arm, tied), self.assumed, snippet)

    def _settle(self, arm: str, tied: dict[str, Estimate]) -> str:
        """Say what would tell the arm from the fastest of those that it is not told apart from.

        The number of prompts is the usual one for a paired comparison, (z s / d)^2 + z^2 / 2 (Guenther 1981), at which
        a difference d, if it stays, is found every other time.
        """
        if not tied:
            return ""
        other = max(tied, key=lambda name: tied[name].value)
        logs = self.logs(other, arm)
        apart = abs(statistics.fmean(logs)) if logs else 0.0
        if len(logs) < _LEAST_PROMPTS:
            return f"More prompts whose texts do not loop would tell {other} from {arm}."
        if apart <= self.run.header.floor:
            return (
                f"{other} and {arm} are as alike as two runs of the same code are here: a quieter machine might tell"
                " them apart."
            )
        z = statistics.NormalDist().inv_cdf(1 - 0.025 / self.comparisons)
        needed = max(len(logs) + 1, math.ceil((z * statistics.stdev(logs) / apart) ** 2 + z**2 / 2))
        return f"About {needed} such prompts would tell {other} from {arm}; this run has {len(logs)}."


def _effort(record: ArmRecord) -> tuple[bool, int, int, int]:
    """Rank what an arm asks for, the least first."""

    def place(kinds: tuple[str, ...], key: str) -> int:
        kind = record.options.get(key, kinds[0])
        return kinds.index(kind) if kind in kinds else len(kinds)

    return record.lossy, place(_DRAFTERS, "drafter"), place(_SHAPES, "shape"), place(_CONTROLLERS, "controller")


def _lossless(contest: _Contest) -> str:
    """Choose the arm for throughput: one that beats plain decoding, or that itself."""
    faster = [arm for arm in contest.lossless if contest.over(arm, BASELINE).low > 1.0]
    return contest.best(faster or [BASELINE])


def _throughput(contest: _Contest, arm: str) -> Recommendation:
    reason = "Lossless, faster than plain decoding beyond the noise, and the simplest that no other such way beats."
    if arm == BASELINE:
        reason = "No lossless way is faster than plain decoding beyond the noise: draft nothing."
    if contest.lossless == [BASELINE]:
        reason = "There is no other lossless way to compare it with."
    if better := [peer for peer in contest.peers if contest.over(peer, arm).low > 1.0]:
        reason += f" Transformers is faster: {', '.join(f'{peer}, {contest.over(peer, arm)}' for peer in better)}."
    return contest.recommendation("highest throughput", arm, reason, contest.lossless)


def _throughput_with_loss(contest: _Contest, lossless: str) -> Recommendation | None:
    """Recommend what is faster still and writes another text, if there is such an arm."""
    lossy = [arm for arm in contest.arms if arm not in contest.lossless]
    faster = [arm for arm in lossy if min(contest.over(arm, than).low for than in (lossless, BASELINE)) > 1.0]
    if not faster:
        return None
    reason = f"Faster than {lossless} beyond the noise, and it writes another text."
    aim = "highest throughput, if loss is acceptable"
    return contest.recommendation(aim, contest.best(faster), reason, [lossless, *lossy])


def _memory(contest: _Contest) -> Recommendation:
    """Recommend the least weights and KV.

    An arm with a draft model comes last: the run does not tell what the draft itself takes.
    """
    plain, noise = contest.memory(BASELINE), f"within {math.expm1(contest.slack):.1%}"
    aim = "memory-bound"
    if math.isnan(plain):
        reason = "The run does not tell what weights and KV take: measure it again."
        return Recommendation(aim, None, reason, assumed=contest.assumed)
    no_slower = contest.no_slower()
    saving = [arm for arm in no_slower if contest.memory(arm) < (1 - NEAR) * plain]
    saving = [arm for arm in saving if not _draft_takes(contest.run.arms[arm])] or saving
    if not saving:
        reason = (
            f"Nothing that is as fast as plain decoding, {noise}, saves {NEAR:.0%} of its {plain / 1e6:.1f} MB of"
            " weights and KV."
        )
        return contest.recommendation(aim, BASELINE, reason, [BASELINE])
    least = min(map(contest.memory, saving))
    near = [arm for arm in saving if contest.memory(arm) <= least + NEAR * plain]
    arm = contest.best(near)
    saved = plain - contest.memory(arm)
    reason = (
        f"Holds {contest.memory(arm) / 1e6:.1f} MB of weights and KV, {saved / 1e6:.1f} MB or {saved / plain:.0%} less"
        f" than plain decoding, and in the mean is no slower than that, {noise}."
        f"{_draft_takes(contest.run.arms[arm])}"
    )
    return contest.recommendation(aim, arm, reason, near)


def _balanced(contest: _Contest, fastest: str) -> Recommendation:
    aim, share = "balanced", f"{HALF:.0%} of plain decoding's KV or less"
    plain = contest.cache(BASELINE)
    small = [arm for arm in contest.no_slower() if contest.cache(arm) <= HALF * plain]
    if not small:
        reason = f"Nothing that is as fast as plain decoding holds {share}, so speed alone decides."
        return contest.recommendation(aim, fastest, reason, [fastest])
    arm = contest.best(small)
    reason = (
        f"Of those that hold {share} and are no slower the simplest that none beats: {contest.cache(arm) / 1e6:.1f} MB"
        f" in place of {plain / 1e6:.1f}.{_draft_takes(contest.run.arms[arm])}"
    )
    return contest.recommendation(aim, arm, reason, small)


def _long_context(contest: _Contest) -> Recommendation:
    """Recommend the best of the bounded caches that were full at the run's longest length."""
    run, length = contest.run, contest.run.header.max_new_tokens
    aim = "long context"
    bounded = [arm for arm in contest.arms if (run.arms[arm].counts().compressions or 0) > 0]
    if not bounded:
        reason = (
            f"No cache that is bounded was full at {length} tokens on enough prompts: measure a preset that has some,"
            " such as long-sequence, more prompts or a greater --max-new-tokens."
        )
        return Recommendation(aim, None, reason, assumed=contest.assumed)
    arm = contest.best(bounded)
    sizes = {at: run.at(at).arms[arm].counters().peak_cache_bytes for at in run.lengths}
    known = ", ".join(f"{size / 1e6:.1f} MB at {at}" for at, size in sizes.items() if size is not None)
    plain = run.arms[BASELINE].counts()
    grown = ratio(plain.grown_bytes, plain.tokens)
    growth = "" if grown is None else f", and it grows by {1e3 * grown / 1e6:.1f} MB in a thousand tokens"
    reason = (
        f"Its KV stays what it is however long the text gets: {known} tokens; plain decoding's is"
        f" {contest.cache(BASELINE) / 1e6:.1f} MB at {length}{growth}.{_draft_takes(run.arms[arm])}"
    )
    return contest.recommendation(aim, arm, reason, bounded)


def _draft_takes(record: ArmRecord) -> str:
    """Say what the figures of memory leave out; nothing if they leave out nothing."""
    takes = {**dict.fromkeys(("head", "model", "universal"), "weights and KV"), "self-streaming": "KV"}
    what = next((takes[kind] for kind in drafter_kinds(record.options) if kind in takes), None)
    return f" The draft's own {what} come on top: the run does not tell them." if what else ""


def _notes(run: RunFile) -> list[str]:
    notes = [
        "Intervals are made for all arms together that are compared (95 %, Student's t, Bonferroni), so they hold for"
        " one that is chosen, and are wider than the report's. None is narrower than the A/A floor,"
        f" {math.expm1(run.header.floor):.1%}."
    ]
    if run.arms[BASELINE].synthetic:
        notes.append(
            "The weights are random: all this is hypothetical, and holds if drafts are accepted as often as was set."
            " What a lossy arm's text is worth is not known."
        )
    return notes + [f"Beware: {warning}." for warning in run.header.warnings]
