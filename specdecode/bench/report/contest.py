"""A comparison of arms on the prompts that count as evidence, and the recommendation of one arm."""

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
"""Fewest prompts that say something about an arm's speed on other prompts."""

# The simplest first: fewer parts to load, to tune and to understand.
_DRAFTERS = ("none", "lookup", "self-streaming", "mtp", "head", "medusa", "model", "universal")
_SHAPES = ("chain", "static", "best-first")
_CONTROLLERS = ("fixed", "adaptive", "cost-aware")


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The recommended arm for one aim.

    Attributes:
        aim: description of the aim.
        arm: name of the arm; None if the run does not show one.
        reason: reason for the choice, in sentences.
        over: its speed over the speed of plain decoding and of each transformers arm, by name.
        beats: its speed over the speed of each allowed arm that it beats: the whole interval is above 1.
        tied: speed of each other allowed arm over its own: the run does not show which is faster.
        settle: advice on how to show which is faster; empty without tied arms.
        assumed: set acceptance of all drafts; None if acceptance was measured.
        code: Python code snippet; for a server's arm, its preset entry.
        plain: name of the plain-decoding arm that it is compared with.
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


def plain_arm(run: RunFile) -> str:
    """Return the arm that all others are compared with: `ar`, or the reference arm in a run of servers without `ar`."""
    baseline = run.header.baseline
    served = baseline in run.arms and "server" in run.arms[baseline].options
    return baseline if served and BASELINE not in run.arms else BASELINE


def evidence(run: RunFile, arm: str) -> dict[str, float]:
    """Return log speedups over `plain_arm` by prompt. For drafting arms, looping texts are left out."""
    record = run.arms[arm]
    # Peers do not report drafts, so every peer except plain "generate" counts as drafting. A looping text
    # is easy to draft, and so no evidence. With replayed drafts it is: their acceptance is set, whatever the text.
    drafting = proposes(record) or record.options.get("peer", "generate") != "generate"
    matters = drafting and not record.synthetic and arm != plain_arm(run)
    logs = run.log_speedups(arm, plain_arm(run))
    return {prompt: log for prompt, log in logs.items() if not (matters and _loops(record.rows[prompt]))}


@dataclass(frozen=True, slots=True)
class Contest:
    """A comparison of arms.

    Attributes:
        run: run of the arms.
        arms: names of the compared arms.
        assumed: set acceptance of all drafts; None if acceptance was measured.
        plain: name of the plain-decoding arm among them; empty if servers have none.
    """

    run: RunFile
    arms: list[str]
    assumed: float | None = None
    plain: str = BASELINE

    @property
    def peers(self) -> list[str]:
        """Return the arms of transformers with right outputs; none if servers are compared."""
        served = any("server" in self.run.arms[arm].options for arm in self.arms)
        return [] if served else [arm for arm, record in self.run.arms.items() if record.peer and not record.faulty]

    @property
    def floor(self) -> float:
        """Return the A/A floor of comparisons with plain decoding, as a natural logarithm."""
        return self.run.floor_over(self.plain)

    @property
    def lossless(self) -> list[str]:
        return [arm for arm in self.arms if not self.run.arms[arm].lossy]

    @property
    def comparisons(self) -> int:
        return max(1, len(self.arms) - 1)

    def logs(self, arm: str, other: str) -> list[float]:
        """Return log speedups of `arm` over `other`, for each prompt that is evidence for both."""
        logs, others = evidence(self.run, arm), evidence(self.run, other)
        return [logs[prompt] - others[prompt] for prompt in logs if prompt in others]

    def over(self, arm: str, other: str) -> Estimate:
        """Return the speed of `arm` over the speed of `other`, with its interval."""
        if arm == other:
            return Estimate(1.0, 1.0, 1.0)
        if not (logs := self.logs(arm, other)):
            return Estimate(math.nan, 0.0, math.inf)
        return simultaneous_ratio(logs, self.comparisons, self.floor)

    def speed(self, arm: str) -> float:
        """Return the mean log speedup over `plain_arm`."""
        return statistics.fmean(evidence(self.run, arm).values())

    def best(self, arms: Sequence[str]) -> str:
        """Return the simplest unbeaten arm: lossless before lossy, and the fastest of equally simple arms."""
        unbeaten = [arm for arm in arms if all(self.over(other, arm).low <= 1.0 for other in arms)]
        return min(unbeaten, key=lambda arm: (_effort(self.run.arms[arm]), -self.speed(arm)))

    def no_slower(self) -> list[str]:
        """Return the arms that on average are at most `slack` slower than plain decoding.

        Arms with too few prompts for an interval are left out.
        """
        known = [arm for arm in self.arms if math.isfinite(self.over(arm, self.plain).high)]
        return [arm for arm in known if self.speed(arm) >= -self.slack]

    @property
    def slack(self) -> float:
        """Return the A/A floor, or the gate's tolerance if that is smaller, as a natural logarithm."""
        return min(self.floor, math.log1p(TOLERANCE))

    def cache(self, arm: str) -> float:
        """Return the peak bytes of keys and values, averaged over the prompts; nan if unknown."""
        size = self.run.arms[arm].counters().peak_cache_bytes
        return math.nan if size is None else size

    def memory(self, arm: str) -> float:
        """Return the bytes of the target's weights plus the peak bytes of keys and values; nan if unknown."""
        weights = self.run.arms[arm].counters_run.weight_bytes
        return math.nan if weights is None else weights + self.cache(arm)

    def recommendation(self, aim: str, arm: str, reason: str, allowed: Collection[str]) -> Recommendation:
        """Return the recommendation of an arm, compared with the other arms that the aim allows."""
        record = self.run.arms[arm]
        known = [other for other in (self.plain, *self.peers) if other in self.run.arms]
        rivals = [other for other in known if other != arm and self.logs(arm, other)]
        over = {other: self.over(arm, other) for other in rivals}
        (agreed,) = cells(self.run, arm, ["agreement"])
        if record.lossy and agreed:
            reason += f" {agreed} of its tokens come before its text first differs from {self.run.baseline_of(arm)}'s."
        if not_counted := len(record.rows) - len(evidence(self.run, arm)):
            reason += f" {not_counted} of its {len(record.rows)} texts loop, and are not counted."
        ratios = {other: self.over(arm, other) for other in allowed if other != arm}
        beats = {other: ratio for other, ratio in ratios.items() if ratio.low > 1.0}
        tied = {other: self.over(other, arm) for other in ratios if other not in beats}
        code = server_entry(self.run, arm) if "server" in record.options else code_snippet(self.run, arm)
        settle = self._settle(arm, tied)
        return Recommendation(aim, arm, reason, over, beats, tied, settle, self.assumed, code, self.plain)

    def _settle(self, arm: str, tied: dict[str, Estimate]) -> str:
        """Return advice on how to show whether the fastest tied arm is faster than the arm; empty without tied arms.

        The number of prompts is the sample size of a paired comparison, (z s / d)^2 + z^2 / 2 (Guenther 1981). With
        so many prompts, a true difference d is found with probability one half.
        """
        if not tied:
            return ""
        other = max(tied, key=lambda name: tied[name].value)
        logs = self.logs(other, arm)
        apart = abs(statistics.fmean(logs)) if logs else 0.0
        if len(logs) < LEAST_PROMPTS:
            return f"More prompts whose texts do not loop would show whether {other} is faster than {arm}."
        if apart <= self.floor:
            return (
                f"{other} and {arm} differ no more than two runs of the same code do here: a quieter machine might show"
                " which is faster."
            )
        z = statistics.NormalDist().inv_cdf(1 - 0.025 / self.comparisons)
        needed = max(len(logs) + 1, math.ceil((z * statistics.stdev(logs) / apart) ** 2 + z**2 / 2))
        both = self.run.arms[other].rows.keys() & self.run.arms[arm].rows.keys()
        without_loops = f" whose texts do not loop, of {len(both)}" if len(both) > len(logs) else ""
        return (
            f"About {needed} prompts like these would show whether {other} is faster than {arm}; this run has"
            f" {len(logs)}{without_loops}."
        )


def _effort(record: ArmRecord) -> tuple[bool, int, int, int]:
    """Return a sort key of an arm's complexity: the simplest arm comes first."""

    def place(kinds: tuple[str, ...], key: str) -> int:
        kind = record.options.get(key, kinds[0])
        return kinds.index(kind) if kind in kinds else len(kinds)

    return record.lossy, place(_DRAFTERS, "drafter"), place(_SHAPES, "shape"), place(_CONTROLLERS, "controller")
