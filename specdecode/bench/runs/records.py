"""A run as it is stored and compared: its header, and for each arm the sums over each prompt."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from specdecode.bench.runs.counts import (
    Histograms,
    Latencies,
    RowCounts,
    RowSeconds,
    all_latencies,
    ratio,
    total,
    total_histograms,
)
from specdecode.bench.runs.looks import tail_of_arm
from specdecode.bench.runs.measures import Counters, CountersRun, Measures, counters_of
from specdecode.bench.runs.names import BASELINE, hardware_name
from specdecode.bench.runs.statistics import (
    NOISE_OF_TWO,
    TAIL,
    UNKNOWN,
    Estimate,
    known,
    mean_ratio,
    median,
    noise_floor,
    percentile_95,
)
from specdecode.support.files import fitting, slug


@dataclass(frozen=True, slots=True)
class Identity:
    """The properties that runs must share to be compared.

    Attributes:
        hardware: name of the GPU, or the processor's model and threads; and how several devices share the models. Times
            are comparable only on equal hardware. "any" in a baseline of counters.
        target: the model that decides, as the user named it.
        draft: the model that proposes, as the user named it; empty without a draft.
        dtype: data type of the weights.
        preset: name of the preset.
    """

    hardware: str
    target: str
    draft: str
    dtype: str
    preset: str

    @property
    def models(self) -> tuple[str, str]:
        """Return the names of target and draft. Different names may share a file, whose name has fewer characters."""
        target, draft = (os.path.normpath(name) if name else "" for name in (self.target, self.draft))
        return target, draft

    @property
    def file(self) -> Path:
        """Return the path of the baseline for this identity, below the folder of baselines."""
        pair = f"{slug(self.target)}+{slug(self.draft)}" if self.draft else slug(self.target)
        return Path(self.hardware) / fitting(f"{pair}-{self.dtype}-{self.preset}.json")


@dataclass(frozen=True, slots=True)
class Header:
    """The settings and conditions of a run.

    Attributes:
        identity: the properties that runs must share to be compared.
        max_new_tokens: tokens of each output, unless a stop token ended it.
        outputs: digest of the reference arm's output for each prompt, in order.
        floor: the A/A floor, a natural logarithm: how far from 1 the mean ratio of two runs of the same code may lie.
        roofline: tokens per second at which the target's weights can be streamed once per token; 0 if not measured.
        versions: versions of Python, torch, transformers and so on; and the source of the target's weights.
        conditions: state of the device before and after the run: clocks, temperature, load.
        baseline: the arm that other arms are compared with, unless they name another: the reference arm.
        until: the slowdown, as a share, that the verdicts had to detect. They were computed after each repeat, and arms
            with a clear verdict were not measured again. None if the number of repeats was fixed.
        budget_spent: whether the time budget ended the repeats, before all verdicts were clear.
        left: number of blocks left to measure when the file was written, for a stopped run or a spent budget.
        unselected: arms of the preset, or of the run or commit it is judged by, that the session did not select.
        tolerance: the share by which a time could be worse in the session's verdicts; None in older files.
        prompts: digest of the tokens of each prompt; empty in older files.
    """

    identity: Identity
    max_new_tokens: int
    outputs: dict[str, str]
    floor: float
    roofline: float = 0.0
    versions: dict[str, str | int] = field(default_factory=dict)
    conditions: dict[str, dict[str, str]] = field(default_factory=dict)
    baseline: str = BASELINE
    until: float | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    budget_spent: bool = False
    left: int = 0
    unselected: list[str] = field(default_factory=list)
    tolerance: float | None = None

    @property
    def processes(self) -> int:
        """Return the number of processes that share the target's weights."""
        return self._count("processes")

    @property
    def devices(self) -> int:
        """Return the number of devices over which the target's layers are spread."""
        return self._count("devices")

    @property
    def draft_device(self) -> str:
        """Return the device of the draft, if it is not the target's; else ""."""
        return str(self.versions.get("draft device", ""))

    def _count(self, name: str) -> int:
        return count if isinstance(count := self.versions.get(name), int) else 1

    @property
    def on_gpu(self) -> bool:
        """Return whether the target ran on a GPU."""
        several = self.processes, self.devices, self.draft_device
        return self.identity.hardware == hardware_name(slug(str(self.versions.get("gpu", ""))), *several)

    @property
    def warnings(self) -> list[str]:
        """Return the reasons to doubt the times, as sentences."""
        end = "the time budget was spent" if self.budget_spent else "the run was stopped"
        sentences = [f"{end} when {self.left} block(s) were left"] if self.left else []
        for when, condition in self.conditions.items():
            throttled = condition.get("clocks_throttle_reasons.active", "")
            # A hexadecimal mask. Its lowest bit means an idle GPU, which is normal before and after a run.
            if re.fullmatch("0x[0-9a-fA-F]{1,16}", throttled) and int(throttled, 16) & ~1:
                sentences.append(f"{when} the run the GPU was throttled (reasons {throttled})")
            if "; " in condition.get("processes", ""):
                sentences.append(f"{when} the run other processes were on the GPU")
        return sentences


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one arm on one prompt, summed over the repeats with correct outputs.

    Attributes:
        log_speedup: natural logarithm of the speedup over the run's reference arm in a block, the mean of repeats.
        counts: sums of counts over the repeats.
        seconds: sums of seconds over the repeats.
        histograms: sums of histograms over the repeats.
        latencies: latencies of a server's requests, in all repeats.
        logs: the log speedup of each repeat; `log_speedup` is their mean. Empty for one repeat, and in older files.
        repeat_numbers: number of each repeat, from 0: some are left out. Empty for 0, 1, ..., and in older files.
    """

    log_speedup: float
    counts: RowCounts
    seconds: RowSeconds
    histograms: Histograms = field(default_factory=Histograms)
    latencies: Latencies = field(default_factory=Latencies)
    logs: list[float] = field(default_factory=list)
    repeat_numbers: list[int] = field(default_factory=list)

    @property
    def repeats(self) -> list[float]:
        """Return the log speedup of each repeat, or only their mean if the repeats are unknown."""
        return self.logs or [self.log_speedup]

    @property
    def by_repeat(self) -> dict[int, float]:
        """Return `repeats` by their numbers."""
        return dict(zip(self.repeat_numbers or range(len(self.repeats)), self.repeats, strict=True))


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """Results of one arm.

    Attributes:
        rows: results on each prompt, by the prompt's id.
        bugs: number of wrong outputs. Their times and counts are void, and not in the rows.
        ties: number of outputs whose first difference from the reference arm's output is within the target's rounding.
        synthetic: whether weights or acceptance are artificial, so that only the costs are real.
        against: the peer's arm with the same method and settings, if there is one.
        baseline: the arm that it is compared with; the run's reference arm if none is named.
        lossy: whether its outputs were checked against a reference of their own, and not against the reference arm's.
        peer: whether transformers decodes it. The parts of a peer's steps are not counted.
        counters_run: results of the untimed counters run; "rehearsal" in files.
        timed: whether the clock decided its draft lengths, and so its counts.
        options: its entry in the preset; empty in older files.
        shorter: rows of the same runs cut at shorter lengths, by the length in tokens.
        failure: error message of an arm from code, or of a server, that failed to decode. Its rows are from before.
        outputs: digest of its output for each prompt, if other arms name it as their reference arm.
        repeated: number of runs that were measured again, because other work disturbed them.
        disturbed: number of runs that other work disturbed in every try. They stay in the rows.
        captured: number of timed runs that captured CUDA graphs or compiled in every try. They stay in the rows.
        slices: number of slices of a few steps in runs that took turns.
        left_out: number of slices that are not compared, because other work disturbed them.
    """

    rows: dict[str, Row]
    bugs: int = 0
    ties: int = 0
    synthetic: bool = False
    against: str | None = None
    baseline: str | None = None
    lossy: bool = False
    peer: bool = False
    counters_run: CountersRun = field(default_factory=CountersRun)
    timed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    shorter: dict[int, dict[str, Row]] = field(default_factory=dict)
    failure: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    disturbed: int = 0
    captured: int = 0
    slices: int = 0
    left_out: int = 0

    @property
    def faulty(self) -> bool:
        """Return whether it failed to decode, or an output was wrong: then its times are void."""
        return bool(self.bugs or self.failure)

    @property
    def most_repeats(self) -> int:
        """Return the number of repeats, on the prompt with the most."""
        return max((len(row.repeats) for row in self.rows.values()), default=1)

    def counts(self, prompts: Iterable[str] | None = None) -> RowCounts:
        """Sum the counts over prompts; over all if None."""
        return total(RowCounts, (row.counts for row in self._rows(prompts)))

    def seconds(self, prompts: Iterable[str] | None = None) -> RowSeconds:
        """Sum the seconds over prompts; over all if None."""
        return total(RowSeconds, (row.seconds for row in self._rows(prompts)))

    def histograms(self, prompts: Iterable[str] | None = None) -> Histograms:
        """Sum the histograms over prompts; over all if None."""
        return total_histograms(row.histograms for row in self._rows(prompts))

    def counters(self, prompts: Iterable[str] | None = None) -> Counters:
        """Compute the counters over prompts; over all if None."""
        return counters_of(self.counts(prompts))

    def _rows(self, prompts: Iterable[str] | None) -> list[Row]:
        return list(self.rows.values()) if prompts is None else [self.rows[prompt] for prompt in prompts]

    def reached(self, prompts: Iterable[str] | None = None) -> list[float]:
        """Return the share of steps that committed at least 1, 2, ... proposals; [] without any draft."""
        accepted = self.histograms(prompts).accepted
        return [sum(accepted[length:]) / sum(accepted) for length in range(1, len(accepted)) if any(accepted)]

    def acceptance_by_position(self) -> list[float]:
        """Return the acceptance rate at each depth from 1: steps that committed a node there, over trees that deep."""
        steps = self.histograms()
        shares = (ratio(sum(steps.accepted[at:]), sum(steps.depth[at:])) for at in range(1, len(steps.depth)))
        return [math.nan if share is None else share for share in shares]


@dataclass(frozen=True)
class RunFile:
    """One run: its header, and its arms by name.

    Attributes:
        path: path of its file; empty for a run of this session.
        header: settings and conditions of the run.
        arms: records by arm name, in the preset's order.
        commit, date, reason: commit of the code, date of the run, and reason for blessing it; empty if unknown.
        together: in a baseline, runs of the same models, prompts and lengths on other machines of this hardware.
    """

    path: Path
    header: Header
    arms: dict[str, ArmRecord]
    commit: str = ""
    date: str = ""
    reason: str = ""
    together: list[RunFile] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Return the output lengths for `at`, the full length last."""
        return [*sorted({at for record in self.arms.values() for at in record.shorter}), self.header.max_new_tokens]

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Return the prompts of each task. The task is the part of a prompt's id before the last slash."""
        tasks: dict[str, list[str]] = {}
        for prompt in self.header.outputs:
            tasks.setdefault(prompt.rpartition("/")[0], []).append(prompt)
        return tasks

    def at(self, length: int) -> RunFile:
        """Return the run as it was when the outputs had a given length, one of `lengths`."""
        if length == self.header.max_new_tokens:
            return self
        arms = {arm: replace(record, rows=record.shorter.get(length, {})) for arm, record in self.arms.items()}
        return self._part(replace(self.header, max_new_tokens=length), arms)

    def with_prompts(self, prompts: Collection[str]) -> RunFile:
        """Return the part of the run with some prompts. Wrong outputs, ties and the counters run stay as they are."""

        def chosen(rows: dict[str, Row]) -> dict[str, Row]:
            return {prompt: row for prompt, row in rows.items() if prompt in prompts}

        outputs = {prompt: output for prompt, output in self.header.outputs.items() if prompt in prompts}
        arms = {
            arm: replace(
                record, rows=chosen(record.rows), shorter={at: chosen(rows) for at, rows in record.shorter.items()}
            )
            for arm, record in self.arms.items()
        }
        return self._part(replace(self.header, outputs=outputs), arms)

    def _part(self, header: Header, arms: dict[str, ArmRecord]) -> RunFile:
        """Return a part of the run, with its own A/A floor if that is higher: fewer runs average out less noise."""
        part = replace(self, header=header, arms=arms)
        return replace(part, header=replace(header, floor=max(header.floor, part._noise_of(self.header.baseline))))

    def baseline_of(self, arm: str) -> str:
        """Return the arm that an arm is compared with."""
        return self.arms[arm].baseline or self.header.baseline

    @property
    def compared_with(self) -> str:
        """Return the arm that all arms are compared with; "its reference arm" if that differs."""
        baselines = {self.baseline_of(arm) for arm in self.arms}
        return self.header.baseline if baselines <= {self.header.baseline} else "its reference arm"

    def outputs_of(self, arm: str) -> dict[str, str]:
        """Return the digest of an arm's expected output by prompt: its reference arm's output."""
        named = self.arms[arm].baseline
        return self.header.outputs if named is None or named not in self.arms else self.arms[named].outputs

    def floor_over(self, baseline: str) -> float:
        """Return the A/A floor of comparisons with an arm, in logarithms; the run's if the arm ran once a block."""
        if baseline == self.header.baseline:
            return self.header.floor
        return self._noise_of(baseline) or self.header.floor

    def _noise_of(self, baseline: str) -> float:
        """Compute the A/A floor from an arm's two runs in each block; 0 without second runs."""
        rows = self.arms[baseline].rows.values() if baseline in self.arms else ()
        both = [(row.seconds.total, row.seconds.last) for row in rows if row.seconds.last is not None]
        return noise_floor([NOISE_OF_TWO * math.log(first / last) for first, last in both])

    def log_speedups(self, arm: str, over: str | None = None) -> dict[str, float]:
        """Return log speedups of an arm over another in the same block, by prompt, if both outputs were correct.

        Args:
            arm: name of the arm.
            over: name of the other arm; the arm's reference arm if None.
        """
        over = over or self.baseline_of(arm)
        rows, others = self.arms[arm].rows, self.arms[over].rows if over in self.arms else {}
        return {prompt: rows[prompt].log_speedup - others[prompt].log_speedup for prompt in rows if prompt in others}

    def tail(self, arm: str) -> float:
        """Return the tail of the intervals of an arm's changes; smaller if verdicts were computed after each repeat."""
        if self.header.until is None:
            return TAIL
        of_all = [record.most_repeats for record in self.arms.values()]
        return tail_of_arm(self.arms[arm].most_repeats, of_all, self.header.budget_spent)

    def speedup(self, arm: str, over: str | None = None) -> Estimate:
        """Return the mean speedup of an arm over another, by default its reference arm; nan if no block has both."""
        over = over or self.baseline_of(arm)
        logs = self.log_speedups(arm, over)
        if not logs:
            return UNKNOWN
        return mean_ratio([[log] for log in logs.values()], floor=0.0 if arm == over else self.floor_over(over))

    def predicted_speedup(self, arm: str) -> float:
        """Return the speedup computed from the acceptance and the costs of forwards, without overhead; nan for a peer.

        tau * t / (d + v): tokens per step, times the reference arm's seconds per token, over the seconds of drafting
        and verifying per step (Leviathan et al. 2023, section 3.3, with measured costs in place of one draft forward
        per token and one cost for every width). Both sides leave out the first step, in which the target reads the
        prompt. A draft reads the prompt in a later step, so the time for this is included.
        """
        over = self.baseline_of(arm)
        if arm == over or over not in self.arms:
            return math.nan
        record, baseline = self.arms[arm], self.arms[over]
        prompts = [prompt for prompt in record.rows if prompt in baseline.rows]
        spent, plainly = record.seconds(prompts), baseline.seconds(prompts)
        if spent.later_draft is None or spent.later_verify is None:
            return math.nan
        tokens_per_s = ratio(record.counts(prompts).later_tokens, spent.later_draft + spent.later_verify)
        plain_tokens_per_s = ratio(baseline.counts(prompts).later_tokens, plainly.later_verify)
        predicted = ratio(tokens_per_s, plain_tokens_per_s)
        return math.nan if predicted is None else predicted

    def measures(self, arm: str) -> Measures:
        """Return the measures of an arm. They are computed once, for all arms."""
        return self._measures[arm]

    @cached_property
    def _measures(self) -> dict[str, Measures]:
        return {arm: self._measured(arm) for arm in self.arms}

    def _measured(self, arm: str) -> Measures:
        record = self.arms[arm]
        rows, counts, seconds = list(record.rows.values()), record.counts(), record.seconds()
        speeds = [row.counts.tokens / row.seconds.total for row in rows]
        speedup, over_peer = self.speedup(arm), self.speedup(arm, record.against) if record.against else UNKNOWN
        throughput, loss = ratio(counts.tokens, seconds.total), ratio(counts.nll, counts.tokens)
        latencies = all_latencies(row.latencies for row in rows)
        return Measures(
            throughput=throughput,
            throughput_std=statistics.stdev(speeds) if len(speeds) > 1 else None,
            speedup=known(speedup.value),
            speedup_low=known(speedup.low),
            speedup_high=known(speedup.high),
            ttft_s=median(latencies.ttft or [ratio(row.seconds.ttft, row.counts.runs) for row in rows]),
            tpot_s=median(
                latencies.tpot
                or [ratio(row.seconds.total - row.seconds.ttft, row.counts.tokens - row.counts.runs) for row in rows]
            ),
            counters=counters_of(counts),
            counters_run=record.counters_run,
            predicted_speedup=known(self.predicted_speedup(arm)),
            roofline_share=ratio(throughput, self.header.roofline),
            ties=float(record.ties),
            bugs=float(record.bugs),
            synthetic=float(record.synthetic),
            lossy=float(record.lossy),
            agreement=ratio(counts.agreed, counts.tokens),
            self_ppl=None if loss is None else math.exp(loss),
            repetition=ratio(counts.repeated, counts.ngrams),
            grown_bytes=ratio(counts.grown_bytes, counts.runs),
            draft_s_per_step=ratio(seconds.draft, counts.steps),
            verify_s_per_step=ratio(seconds.verify, counts.steps),
            overhead_s_per_step=ratio(seconds.overhead, counts.steps),
            over_peer=known(over_peer.value),
            over_peer_low=known(over_peer.low),
            over_peer_high=known(over_peer.high),
            ttft_p95_s=percentile_95(latencies.ttft),
            tpot_p95_s=percentile_95(latencies.tpot),
        )
