"""Compare arms with each other by the prompts that are evidence, and recommend one of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from specdecode.bench.arms.snippet import code_snippet
from specdecode.bench.gate.baselines import TOLERANCE
from specdecode.bench.report.captions import LOOPS, cells, proposes
from specdecode.bench.report.server_entry import server_entry
from specdecode.bench.runs.counts import ratio
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, Row, RunFile
from specdecode.bench.runs.statistics import Estimate, simultaneous_ratio

LEAST_PROMPTS = 2
"""Prompts of which an arm's speed says something of others."""

# From the simplest on: what has to be loaded, tuned and understood.
_DRAFTERS = ("none", "lookup", "self-streaming", "mtp", "head", "medusa", "model", "universal")
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
        code: lines of Python; of a server's arm its entry of a preset.
        plain: the arm of plain decoding that it is compared with.
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
    plain: str = BASELINE


def _loops(row: Row) -> bool:
    return (ratio(row.counts.repeated, row.counts.ngrams) or 0.0) >= LOOPS


def yardstick(run: RunFile) -> str:
    """Return the arm that all others are compared with: `ar`, or in a run of servers without it the run's baseline."""
    baseline = run.header.baseline
    served = baseline in run.arms and "server" in run.arms[baseline].options
    return baseline if served and BASELINE not in run.arms else BASELINE


def evidence(run: RunFile, arm: str) -> dict[str, float]:
    """Return log speedups over the yardstick by prompt, without those of a draft that was good at repeating."""
    record = run.arms[arm]
    # Of the peers it is not known, but for their plain decoding. What is replayed is accepted as often anywhere.
    drafting = proposes(record) or record.options.get("peer", "generate") != "generate"
    matters = drafting and not record.synthetic and arm != yardstick(run)
    logs = run.log_speedups(arm, yardstick(run))
    return {prompt: log for prompt, log in logs.items() if not (matters and _loops(record.rows[prompt]))}


@dataclass(frozen=True, slots=True)
class Contest:
    """Arms that are compared with each other.

    Attributes:
        run: that they are of.
        arms: their names.
        assumed: the acceptance that was set for all that draft.
        plain: the arm of plain decoding among them; of servers there may be none.
    """

    run: RunFile
    arms: list[str]
    assumed: float | None = None
    plain: str = BASELINE

    @property
    def peers(self) -> list[str]:
        """Return transformers' arms; none where servers are compared."""
        served = any("server" in self.run.arms[arm].options for arm in self.arms)
        return [] if served else [arm for arm, record in self.run.arms.items() if record.peer]

    @property
    def floor(self) -> float:
        """Return the A/A floor of what is compared with plain decoding, in logarithms."""
        return self.run.floor_over(self.plain)

    @property
    def lossless(self) -> list[str]:
        return [arm for arm in self.arms if not self.run.arms[arm].lossy]

    @property
    def comparisons(self) -> int:
        return max(1, len(self.arms) - 1)

    def logs(self, arm: str, other: str) -> list[float]:
        """Return log speedups of one over the other, prompt by prompt, where both are evidence."""
        logs, others = evidence(self.run, arm), evidence(self.run, other)
        return [logs[prompt] - others[prompt] for prompt in logs if prompt in others]

    def over(self, arm: str, other: str) -> Estimate:
        """Return the speed of one over the other's."""
        if arm == other:
            return Estimate(1.0, 1.0, 1.0)
        if not (logs := self.logs(arm, other)):
            return Estimate(math.nan, 0.0, math.inf)
        return simultaneous_ratio(logs, self.comparisons, self.floor)

    def speed(self, arm: str) -> float:
        """Return the mean log speedup over the yardstick."""
        return statistics.fmean(evidence(self.run, arm).values())

    def best(self, arms: Sequence[str]) -> str:
        """Return the simplest of the arms that none is found to beat: lossless before lossy, of a kind the fastest."""
        unbeaten = [arm for arm in arms if all(self.over(other, arm).low <= 1.0 for other in arms)]
        return min(unbeaten, key=lambda arm: (_effort(self.run.arms[arm]), -self.speed(arm)))

    def no_slower(self) -> list[str]:
        """Return the arms that on average are slower than plain decoding by `slack` at most.

        An arm of whose speed too little is known for an interval is not among them.
        """
        known = [arm for arm in self.arms if math.isfinite(self.over(arm, self.plain).high)]
        return [arm for arm in known if self.speed(arm) >= -self.slack]

    @property
    def slack(self) -> float:
        """Return what two runs of the same code may differ by, in logarithms; at most what the gate lets pass."""
        return min(self.floor, math.log1p(TOLERANCE))

    def cache(self, arm: str) -> float:
        """Return the most bytes of keys and values, averaged over the prompts; nan if they are not known."""
        size = self.run.arms[arm].counters().peak_cache_bytes
        return math.nan if size is None else size

    def memory(self, arm: str) -> float:
        """Return the same with the target's weights."""
        weights = self.run.arms[arm].counters_run.weight_bytes
        return math.nan if weights is None else weights + self.cache(arm)

    def recommendation(self, aim: str, arm: str, reason: str, allowed: Collection[str]) -> Recommendation:
        """Recommend the arm, with what it beats of the arms that the aim allows, and what it is not told apart from."""
        record = self.run.arms[arm]
        known = [other for other in (self.plain, *self.peers) if other in self.run.arms]
        yardsticks = [other for other in known if other != arm and self.logs(arm, other)]
        over = {other: self.over(arm, other) for other in yardsticks}
        (agreed,) = cells(self.run, arm, ["agreement"])
        if record.lossy and agreed:
            reason += f" Of its tokens {agreed} come before it leaves {self.run.baseline_of(arm)}'s text."
        if not_counted := len(record.rows) - len(evidence(self.run, arm)):
            reason += f" {not_counted} of its {len(record.rows)} texts loop, and are not counted."
        ratios = {other: self.over(arm, other) for other in allowed if other != arm}
        beats = {other: ratio for other, ratio in ratios.items() if ratio.low > 1.0}
        tied = {other: self.over(other, arm) for other in ratios if other not in beats}
        code = server_entry(self.run, arm) if "server" in record.options else code_snippet(self.run, arm)
        settle = self._settle(arm, tied)
        return Recommendation(aim, arm, reason, over, beats, tied, settle, self.assumed, code, self.plain)

    def _settle(self, arm: str, tied: dict[str, Estimate]) -> str:
        """Say what would tell the arm from the fastest of those that it is not told apart from.

        The number of prompts is that of a paired comparison, (z s / d)^2 + z^2 / 2 (Guenther 1981). With so many, a
        difference d that persists is found every other time.
        """
        if not tied:
            return ""
        other = max(tied, key=lambda name: tied[name].value)
        logs = self.logs(other, arm)
        apart = abs(statistics.fmean(logs)) if logs else 0.0
        if len(logs) < LEAST_PROMPTS:
            return f"More prompts whose texts do not loop would tell {other} from {arm}."
        if apart <= self.floor:
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
