"""A run as it is kept and compared: what was measured where, and arm by arm the sums over each prompt."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.statistics import Estimate, mean_ratio, noise_floor
from specdecode.support.files import slug

COUNTERS = {
    "target_forwards_per_token": (-1, "target_forwards", "tokens"),
    "draft_forwards_per_token": (-1, "draft_forwards", "tokens"),
    "mean_acceptance_length": (+1, "tokens", "steps"),
    "acceptance_rate": (+1, "accepted", "drafted"),
    "cache_bytes": (-1, "cache_bytes", "runs"),
    "peak_cache_bytes": (-1, "peak_cache_bytes", "runs"),
    "attended_bytes_per_step": (-1, "attended_bytes", "steps"),
    "compressions": (-1, "compressions", "runs"),
}
"""Measures that do not depend on the clock: whether more of one is better (+1) or worse (-1), and the counts whose
sums over prompts it is the ratio of."""

REHEARSED = {"host_syncs_per_step": -1, "forwards_per_step": -1, "weight_bytes": -1, "peak_bytes": -1}
"""The same for what is counted in the rehearsal. These depend on the kind of device."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What runs must share to be compared.

    Attributes:
        hardware: the GPU's name, or the processor's model and threads: times mean something only on the same.
        target, draft: names of models, as they were given.
        dtype: of the weights.
        preset: its name.
    """

    hardware: str
    target: str
    draft: str
    dtype: str
    preset: str

    @property
    def file(self) -> Path:
        """Where the baseline of such a run is kept, below the folder of baselines."""
        pair = f"{slug(self.target)}+{slug(self.draft)}" if self.draft else slug(self.target)
        return Path(self.hardware) / f"{pair}-{self.dtype}-{self.preset}.json"


@dataclass(frozen=True, slots=True)
class Header:
    """What was measured, and where.

    Attributes:
        identity: what runs must share.
        max_new_tokens: length of every output, unless a stop token ended it.
        outputs: for each prompt, in order, a digest of what the baseline wrote.
        floor: the A/A floor, in logarithms.
        roofline: tokens per second at which the target's weights can be streamed once per token; 0 if not measured.
        versions: of Python, torch, transformers and so on, for information; and the source of the target's weights.
        conditions: of the device before and after: clocks, temperature, load.
    """

    identity: Identity
    max_new_tokens: int
    outputs: dict[str, str]
    floor: float
    roofline: float = 0.0
    versions: dict[str, str | int] = field(default_factory=dict)
    conditions: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What in the conditions speaks against the times, in sentences."""
        found = []
        for when, told in self.conditions.items():
            throttled = told.get("clocks_throttle_reasons.active", "")
            # The lowest bit says that the GPU is idle, which it is before and after a run.
            if throttled.startswith("0x") and int(throttled, 16) & ~1:
                found.append(f"{when} the run the GPU was throttled (reasons {throttled})")
            if "; " in told.get("processes", ""):
                found.append(f"{when} the run other processes were on the GPU")
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one prompt, summed over repeats whose outputs were right.

    Attributes:
        log_speedup: over `ar` in the same block, mean of the repeats.
        counts: "runs", "tokens", "agreed" (those before the output leaves `ar`'s), "steps" and the others of
            `bench.arms.Run`; "ngrams", "repeated" and "nll" of `bench.text`.
        seconds: "total", "ttft" and the others of `bench.arms.Run`; of `ar` also "last", the total of its second runs.
        histograms: of steps, see `bench.arms.Run`.
    """

    log_speedup: float
    counts: dict[str, float]
    seconds: dict[str, float]
    histograms: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """One arm's results.

    Attributes:
        rows: by prompt.
        bugs: outputs that were wrong; their times and counts are void, and not in the rows.
        ties: outputs that left the baseline's where the target is undecided within its rounding.
        synthetic: weights or acceptance are not real: only costs are.
        against: the peer's arm that does the same with the same settings.
        lossy: its outputs are not the baseline's, but were checked against a reference of their own.
        rehearsal: see REHEARSED.
        timed: how long it drafted depended on the clock, and so did its counts.
        options: the preset's entry that it was made of; empty in older files.
        shorter: rows of the same runs cut at shorter lengths.
    """

    rows: dict[str, Row]
    bugs: int = 0
    ties: int = 0
    synthetic: bool = False
    against: str | None = None
    lossy: bool = False
    rehearsal: dict[str, float] = field(default_factory=dict)
    timed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    shorter: dict[int, dict[str, Row]] = field(default_factory=dict)

    def total(self, name: str, prompts: Iterable[str] | None = None) -> float:
        """Sum over prompts (all, if None) of a count or of "NAME_s", seconds; nan if it was not taken."""
        rows = self.rows.values() if prompts is None else [self.rows[prompt] for prompt in prompts]
        of = [row.seconds if name.endswith("_s") else row.counts for row in rows]
        key = name.removesuffix("_s")
        return sum(values[key] for values in of) if of and all(key in values for values in of) else math.nan

    def counters(self, prompts: Iterable[str] | None = None) -> dict[str, float]:
        """Those of COUNTERS that the arm has, over the given prompts."""
        chosen = list(self.rows if prompts is None else prompts)
        ratios = {
            name: _ratio(self.total(above, chosen), self.total(below, chosen))
            for name, (_, above, below) in COUNTERS.items()
        }
        return {name: value for name, value in ratios.items() if math.isfinite(value)}

    def histogram(self, name: str, prompts: Iterable[str] | None = None) -> list[int]:
        """Steps by "accepted" length or by "depth" of the tree, over the given prompts; empty for a peer."""
        chosen = list(self.rows if prompts is None else prompts)
        lists = [self.rows[prompt].histograms.get(name, []) for prompt in chosen]
        return [sum(of[i] for of in lists if i < len(of)) for i in range(max(map(len, lists), default=0))]

    def reached(self, prompts: Iterable[str] | None = None) -> list[float]:
        """Share of steps that committed at least 1, 2, ... proposals."""
        accepted = self.histogram("accepted", prompts)
        return [sum(accepted[length:]) / sum(accepted) for length in range(1, len(accepted))]

    def acceptance_by_position(self) -> list[float]:
        """For each depth from 1: the share of the trees that reach it of which a node there was committed."""
        accepted, depth = self.histogram("accepted"), self.histogram("depth")
        return [_ratio(sum(accepted[at:]), sum(depth[at:])) for at in range(1, len(depth))]


@dataclass(frozen=True, slots=True)
class RunFile:
    """One run: its header, and its arms by name.

    Attributes:
        path: its file; empty for a run of this session.
        header: what was measured.
        arms: by name, in the preset's order.
        commit, date, reason: of the code, of the run, and why it was blessed; empty where not known.
    """

    path: Path
    header: Header
    arms: dict[str, ArmRecord]
    commit: str = ""
    date: str = ""
    reason: str = ""

    @property
    def lengths(self) -> list[int]:
        """The lengths at which it can be looked at, the whole one last."""
        shorter = {length for record in self.arms.values() for length in record.shorter}
        return [*sorted(shorter), self.header.max_new_tokens]

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The prompts of each task: what stands before the last slash of their ids."""
        found: dict[str, list[str]] = {}
        for prompt in self.header.outputs:
            found.setdefault(prompt.rpartition("/")[0], []).append(prompt)
        return found

    def at(self, length: int) -> RunFile:
        """The run as it was when the outputs had got to a length: one of `lengths`."""
        if length == self.header.max_new_tokens:
            return self
        arms = {arm: replace(record, rows=record.shorter.get(length, {})) for arm, record in self.arms.items()}
        return self._part(replace(self.header, max_new_tokens=length), arms)

    def of(self, prompts: Collection[str]) -> RunFile:
        """The part of the run that is about some of its prompts. Whether an arm wrote a wrong output or a tie, and what
        was rehearsed, is told of the whole."""

        def chosen(rows: dict[str, Row]) -> dict[str, Row]:
            return {prompt: row for prompt, row in rows.items() if prompt in prompts}

        outputs = {prompt: output for prompt, output in self.header.outputs.items() if prompt in prompts}
        arms = {
            arm: replace(
                record,
                rows=chosen(record.rows),
                shorter={length: chosen(rows) for length, rows in record.shorter.items()},
            )
            for arm, record in self.arms.items()
        }
        return self._part(replace(self.header, outputs=outputs), arms)

    def _part(self, header: Header, arms: dict[str, ArmRecord]) -> RunFile:
        """With an A/A floor of its own where that is higher: less was measured, and no less noisily."""
        rows = arms[BASELINE].rows.values() if BASELINE in arms else ()
        noise = [[math.log(row.seconds["total"] / row.seconds["last"])] for row in rows if "last" in row.seconds]
        floor = max(header.floor, noise_floor(noise)) if noise else header.floor
        return replace(self, header=replace(header, floor=floor), arms=arms)

    def log_speedups(self, arm: str, over: str = BASELINE) -> dict[str, float]:
        """Log speedups of an arm over another in the same block, by prompt, where both outputs were right."""
        mine, other = self.arms[arm].rows, self.arms[over].rows if over in self.arms else {}
        return {prompt: mine[prompt].log_speedup - other[prompt].log_speedup for prompt in mine if prompt in other}

    def speedup(self, arm: str, over: str = BASELINE) -> Estimate:
        """The mean speedup of an arm over another, with its interval; nan if no block has both."""
        logs = self.log_speedups(arm, over)
        if not logs:
            return Estimate(math.nan, math.nan, math.nan)
        return mean_ratio([[log] for log in logs.values()], floor=0.0 if arm == over else self.header.floor)

    def predicted_speedup(self, arm: str) -> float:
        """What the arm's acceptance and its forwards promise, without any overhead; nan for a peer.

        tau * t / (d + v): tokens a step, times the seconds per token of `ar`, over the seconds that a step drafts and
        verifies (Leviathan et al. 2023, section 3.3, with measured costs in place of one draft forward per token and
        one price for every width). The first step is left out on both sides: it carries the prompt.
        """
        if arm == BASELINE or BASELINE not in self.arms:
            return math.nan
        record, ar = self.arms[arm], self.arms[BASELINE]
        prompts = [prompt for prompt in record.rows if prompt in ar.rows]
        spent = record.total("later_draft_s", prompts) + record.total("later_verify_s", prompts)
        ours = _ratio(record.total("later_tokens", prompts), spent)
        return _ratio(ours, _ratio(ar.total("later_tokens", prompts), ar.total("later_verify_s", prompts)))

    def measures(self, arm: str) -> dict[str, float]:
        """The measures of an arm, as plain finite numbers: what tables show, and pytest-benchmark keeps."""
        record = self.arms[arm]
        speedup = self.speedup(arm)
        throughput = _ratio(record.total("tokens"), record.total("total_s"))
        rows = record.rows.values()
        speeds = [_ratio(row.counts["tokens"], row.seconds["total"]) for row in rows]
        measures = {
            "throughput": throughput,
            "throughput_std": statistics.stdev(speeds) if len(speeds) > 1 else math.nan,
            "speedup": speedup.value,
            "speedup_low": speedup.low,
            "speedup_high": speedup.high,
            "ttft_s": _median([_ratio(row.seconds["ttft"], row.counts["runs"]) for row in rows]),
            "tpot_s": _median(
                [
                    _ratio(row.seconds["total"] - row.seconds["ttft"], row.counts["tokens"] - row.counts["runs"])
                    for row in rows
                ]
            ),
            **record.counters(),
            **record.rehearsal,
            "predicted_speedup": self.predicted_speedup(arm),
            "roofline_share": _ratio(throughput, self.header.roofline),
            "ties": float(record.ties),
            "bugs": float(record.bugs),
            "synthetic": float(record.synthetic),
            "lossy": float(record.lossy),
            "agreement": _ratio(record.total("agreed"), record.total("tokens")),
            "self_ppl": math.exp(_ratio(record.total("nll"), record.total("tokens"))),
            "repetition": _ratio(record.total("repeated"), record.total("ngrams")),
            "grown_bytes": _ratio(record.total("grown_bytes"), record.total("runs")),
        }
        for part in ("draft", "verify", "overhead"):
            measures[f"{part}_s_per_step"] = _ratio(record.total(f"{part}_s"), record.total("steps"))
        if record.against:
            over = self.speedup(arm, over=record.against)
            measures |= {"over_peer": over.value, "over_peer_low": over.low, "over_peer_high": over.high}
        return {name: float(value) for name, value in measures.items() if math.isfinite(value)}


def digest(tokens: Sequence[int]) -> str:
    """A short name for an output: equal for equal tokens."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
