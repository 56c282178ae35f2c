"""Experiments in blocks: the baselines first, the other arms in a shuffled order, the baselines again."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import get_args

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.check import Check, check
from specdecode.bench.measure.counters import COUNTERS_RUN_TOKENS, counters_run
from specdecode.bench.measure.output_stats import own_losses, with_output_stats
from specdecode.bench.runs.counts import RowCounts, RowSeconds, as_dict, total, total_histograms
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, Row, digest
from specdecode.bench.runs.statistics import noise_floor
from specdecode.drafters.base import common_prefix
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy


@dataclass(frozen=True, slots=True)
class Block:
    """One prompt decoded by every arm, baselines first and last: what is compared was measured together.

    Attributes:
        prompt: its id.
        repeat: which block of this prompt it is, from 0.
        runs: by arm, the first ones of baselines among them.
        last: by baseline, its second run.
        checks: by arm, whether the output is its baseline's ("equal"), or left it at a place where the target itself
            is undecided within its rounding ("tie"), or is wrong ("bug": its time is void).
    """

    prompt: str
    repeat: int
    runs: dict[str, Run]
    last: dict[str, Run]
    checks: dict[str, Check]

    def log_s(self, arm: str) -> float:
        """Return the logarithm of the seconds a token took, the mean of a baseline's two runs.

        For equal outputs this compares as well as the time of the whole.
        """
        runs = [self.runs[arm], self.last[arm]] if arm in self.last else [self.runs[arm]]
        return statistics.fmean(math.log(run.total_s / len(run.tokens)) for run in runs)

    def noise(self, baseline: str) -> float:
        """Return the logarithm of a baseline's first time per token over its second."""
        return replace(self, last={}).log_s(baseline) - replace(self, runs=self.last, last={}).log_s(baseline)

    def at(self, length: int) -> Block:
        """Return the block as it was when its runs had got to a length, without those that stopped before that."""
        runs = {arm: cut for arm, run in self.runs.items() if (cut := run.at(length)) is not None}
        last = {arm: cut for arm, run in self.last.items() if (cut := run.at(length)) is not None and arm in runs}
        return replace(
            self, runs={arm: run for arm, run in runs.items() if arm in last or arm not in self.last}, last=last
        )


@dataclass(frozen=True, slots=True)
class Results:
    """What an experiment measured.

    Attributes:
        arms: how each is compared and called, in the preset's order.
        blocks: in the order of measuring; an arm may be missing in some.
        counters_runs: by arm, what its untimed run counted.
        failures: by arm from code, what it did in place of decoding. From then on it was not run.
        baseline: the arm that others are compared with, unless they name another.
    """

    arms: list[Arm]
    blocks: list[Block]
    counters_runs: dict[str, CountersRun]
    failures: dict[str, str] = field(default_factory=dict)
    baseline: str = BASELINE

    @property
    def floor(self) -> float:
        """Compute the A/A floor, in logarithms, from the two runs of the baseline in each block."""
        noise: dict[str, list[float]] = {}
        for block in self.blocks:
            noise.setdefault(block.prompt, []).append(block.noise(self.baseline))
        return noise_floor(list(noise.values()))

    def durations(self, arm: str) -> list[float]:
        """Return the seconds of each of the arm's runs."""
        return [block.runs[arm].total_s for block in self.blocks if arm in block.runs]

    def wrong(self, arm: str) -> list[str]:
        """Return the prompts on which the arm gave other tokens than its baseline."""
        return [block.prompt for block in self.blocks if block.checks.get(arm) == "bug"]

    def records(self) -> dict[str, ArmRecord]:
        """Return the arms' results as they are kept."""
        return {arm.name: self._record(arm) for arm in self.arms}

    def _record(self, arm: Arm) -> ArmRecord:
        blocks = [block for block in self.blocks if arm.name in block.runs]
        checks = [block.checks[arm.name] for block in blocks]
        lengths = {len(cut.tokens) for block in blocks for cut in block.runs[arm.name].cuts}
        named = {other.baseline for other in self.arms}
        return ArmRecord(
            rows=self._rows(arm, blocks),
            bugs=checks.count("bug"),
            ties=checks.count("tie"),
            synthetic=arm.synthetic,
            against=arm.against if any(other.name == arm.against for other in self.arms) else None,
            baseline=arm.baseline,
            lossy=arm.lossy or arm.unchecked,
            peer=arm.peer,
            counters_run=self.counters_runs.get(arm.name, CountersRun()),
            timed=arm.timed,
            options=arm.options,
            failure=self.failures.get(arm.name, ""),
            shorter={length: self._rows(arm, [block.at(length) for block in blocks]) for length in sorted(lengths)},
            outputs=self.outputs(arm.name) if arm.name in named and arm.name not in self.failures else {},
        )

    def _rows(self, arm: Arm, blocks: Sequence[Block]) -> dict[str, Row]:
        """Make an arm's rows from blocks. They compare with the run's baseline, whatever the arm's own."""
        own = arm.baseline or self.baseline
        repeats: dict[str, list[tuple[float, Run, Run]]] = {}
        last_s: dict[str, float] = {}
        for block in blocks:
            # A time from a wrong output is void.
            if {arm.name, own, self.baseline} <= block.runs.keys() and block.checks[arm.name] != "bug":
                log_speedup = block.log_s(self.baseline) - block.log_s(arm.name)
                repeats.setdefault(block.prompt, []).append((log_speedup, block.runs[arm.name], block.runs[own]))
                if arm.name in block.last:
                    last_s[block.prompt] = last_s.get(block.prompt, 0.0) + block.last[arm.name].total_s
        rows = {}
        for prompt, of_prompt in repeats.items():
            logs, runs, others = zip(*of_prompt, strict=True)
            rows[prompt] = row_of(logs, runs, others, last_s=last_s.get(prompt))
        return rows

    def outputs(self, baseline: str | None = None) -> dict[str, str]:
        """Return a digest of a baseline's tokens by prompt, of the run's own if None.

        Counters are compared where these are the same.
        """
        arm = baseline or self.baseline
        return {block.prompt: digest(block.runs[arm].tokens) for block in self.blocks if arm in block.runs}


def row_of(
    log_speedups: Sequence[float], runs: Sequence[Run], baseline: Sequence[Run], *, last_s: float | None = None
) -> Row:
    """Sum up the runs of one arm on one prompt.

    Args:
        log_speedups: over the run's baseline.
        runs: of the arm.
        baseline: runs of the arm's own baseline beside them, which tell how far the outputs agree.
        last_s: seconds of the second runs of a baseline.
    """
    counts = [
        RowCounts(runs=1, tokens=len(run.tokens), agreed=common_prefix(run.tokens, other.tokens), **as_dict(run.counts))
        for run, other in zip(runs, baseline, strict=True)
    ]
    seconds = [RowSeconds(total=run.total_s, ttft=run.ttft_s, **as_dict(run.seconds)) for run in runs]
    return Row(
        log_speedup=statistics.fmean(log_speedups),
        counts=total(RowCounts, counts),
        seconds=replace(total(RowSeconds, seconds), last=last_s),
        histograms=total_histograms(run.histograms for run in runs),
    )


def experiment(
    arms: Sequence[Arm],
    prompts: dict[str, list[int]],
    max_new_tokens: int,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
    finished: Sequence[Block] = (),
    keep: Callable[[Block], None] = lambda block: None,
    baseline: str = BASELINE,
) -> Results:
    """Measure the arms against their baselines, which must be among them.

    Args:
        arms: their outputs are checked run by run: against their baseline's, or a lossy arm's against its own
            reference.
        prompts: tokens by id.
        max_new_tokens: length of every output, unless a stop token of the arms ends it.
        repeats: blocks for each prompt.
        seed: of the order of arms within a block.
        progress: told the number of runs done, of all runs, and what is going on.
        finished: blocks of an earlier run that was interrupted; they are not measured again.
        keep: given each block as soon as it is finished.
        baseline: the arm that others are compared with, unless they name another.

    Raises:
        ArmError: the baseline is an arm from code, and does not decode.
    """
    known = {(block.prompt, block.repeat): block for block in finished}
    planned = [(prompt, repeat) for repeat in range(repeats) for prompt in prompts]
    runs_of_block = len(arms) + len(_baselines(arms, baseline))
    total = len(arms) + sum(block not in known for block in planned) * runs_of_block
    done = 0

    def tell(doing: str) -> None:
        nonlocal done
        progress(done, total, doing)
        done += 1

    warm = next(iter(prompts))
    length = min(max_new_tokens, COUNTERS_RUN_TOKENS)
    counters_runs: dict[str, CountersRun] = {}
    failures: dict[str, str] = {}
    blocks = []
    with closing(arms, failures):
        written = _named(arms, baseline).run(prompts[warm], length, ()).tokens
        for arm in arms:
            tell(f"{arm.name} on {warm}, the counters run")
            expected = arm.expected(prompts[warm], written, length)
            with _noted(arm, None if arm.name == baseline else failures):
                counters_runs[arm.name] = counters_run(arm, prompts[warm], length, expected)
        for prompt, repeat in planned:
            if block := known.get((prompt, repeat)):
                blocks.append(block)
                continue
            working = [arm for arm in arms if arm.name not in failures]
            blocks.append(
                measure_block(working, prompt, prompts[prompt], max_new_tokens, repeat, seed, tell, failures, baseline)
            )
            keep(blocks[-1])
    progress(total, total, "done")
    return Results(list(arms), blocks, counters_runs, failures, baseline)


def _named(arms: Sequence[Arm], name: str) -> Arm:
    """Return the arm of a name."""
    return next(arm for arm in arms if arm.name == name)


def _baselines(arms: Sequence[Arm], baseline: str) -> list[Arm]:
    """Return the arms that others are compared with, the run's baseline first."""
    named = {arm.baseline for arm in arms} - {None, baseline}
    return [_named(arms, baseline), *(arm for arm in arms if arm.name in named)]


@contextmanager
def closing(arms: Sequence[Arm], failures: dict[str, str]) -> Iterator[None]:
    """Close the arms after the block, whatever happens in it."""
    try:
        yield
    finally:
        for arm in arms:
            with _noted(arm, failures):
                arm.close()


@contextmanager
def _noted(arm: Arm, failures: dict[str, str] | None) -> Iterator[None]:
    """Note that an arm from code failed, so that the others go on; raise where nobody takes notes."""
    try:
        yield
    except ArmError as error:
        if failures is None:
            raise
        failures[arm.name] = str(error)


def measure_block(
    arms: Sequence[Arm],
    prompt: str,
    text: Sequence[int],
    max_new_tokens: int,
    repeat: int = 0,
    seed: int = 0,
    tell: Callable[[str], None] = lambda doing: None,
    failures: dict[str, str] | None = None,
    baseline: str = BASELINE,
) -> Block:
    """Measure the arms, their baselines among them, on one prompt.

    Args:
        arms: as for `experiment`.
        prompt: its id.
        text: its tokens.
        max_new_tokens: length of every output, unless a stop token of the arms ends it.
        repeat: which block of this prompt it is, from 0.
        seed: of the order of arms.
        tell: told what is going on, run by run.
        failures: takes what arms from code did in place of decoding; they are not in the block. If None, the first
            ends the measuring.
        baseline: the arm that others are compared with, unless they name another. If it fails, that ends the measuring.
    """
    baselines = _baselines(arms, baseline)
    others = [arm for arm in arms if arm not in baselines]
    order = random.Random(f"{seed} {prompt} {repeat}").sample(others, len(others))
    # What is to be written, and the prompt's own shapes, so that the first timed run is not their first.
    lossy = any(arm.lossy for arm in arms)
    written = baselines[0].run(text, max_new_tokens if lossy else 1, ()).tokens
    references = _references(arms, text, written, max_new_tokens)
    runs: dict[str, Run] = {}
    last: dict[str, Run] = {}

    def expected(arm: Arm) -> Sequence[int]:
        own = arm.baseline or baseline
        if arm.lossy:
            return references[arm.name]
        if arm.name == baseline:
            return runs[baseline].tokens if baseline in runs else ()
        if own not in runs:
            raise ArmError(f"arm {arm.name!r}: its baseline {own} did not decode")
        return runs[own].tokens

    def measure(arm: Arm, into: dict[str, Run]) -> None:
        tell(f"{arm.name} on {prompt}")
        with _noted(arm, None if arm.name == baseline else failures):
            into[arm.name] = timed(arm, text, max_new_tokens, expected(arm))

    for arm in baselines[1:]:
        with _noted(arm, failures):
            arm.run(text, 1, ())
    for arm in [*baselines, *order]:
        measure(arm, runs)
    for arm in reversed(baselines):
        if arm.name in runs:
            measure(arm, last)
        if arm.name not in last:
            runs.pop(arm.name, None)
    checks: dict[str, Check] = {}
    for arm in arms:
        if arm.name in runs:
            with _noted(arm, failures):
                first, second = runs[arm.name], last.get(arm.name, runs[arm.name])
                checks[arm.name] = _worse(
                    check(arm, text, expected(arm), first.tokens), check(arm, text, first.tokens, second.tokens)
                )
    runs = {name: runs[name] for name in checks}
    target = baselines[0].target
    losses = {
        tokens: None if target is None else own_losses(target, text, tokens)
        for tokens in {tuple(run.tokens) for run in runs.values()}
    }
    runs = {name: with_output_stats(run, losses[tuple(run.tokens)]) for name, run in runs.items()}
    return Block(prompt, repeat, runs, last, checks)


def _references(
    arms: Sequence[Arm], text: Sequence[int], written: Sequence[int], length: int
) -> dict[str, Sequence[int]]:
    """Return what each lossy arm must write: arms of the same weights and policy the same."""
    by_loss: dict[tuple[LM | None, CachePolicy], Sequence[int]] = {}
    for arm in arms:
        if arm.lossy and (arm.target, arm.policy) not in by_loss:
            by_loss[arm.target, arm.policy] = arm.expected(text, written, length)
    return {arm.name: by_loss[arm.target, arm.policy] for arm in arms if arm.lossy}


def _worse(*checks: Check) -> Check:
    """Return the worst of several checks."""
    return max(checks, key=get_args(Check).index)


def timed(arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
    """Run the arm once, with garbage collected before it and not during it."""
    gc.collect()
    gc.disable()
    try:
        return arm.run(prompt, length, expected)
    finally:
        gc.enable()
