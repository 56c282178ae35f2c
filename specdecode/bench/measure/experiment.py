"""Experiments in blocks: the baseline first, the arms in a shuffled order, the baseline again."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.check import Check, classify
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
    """One prompt decoded by every arm, the baseline first and last: what is compared was measured together.

    Attributes:
        prompt: its id.
        repeat: which block of this prompt it is, from 0.
        runs: by arm, the baseline's first one among them.
        last: the baseline's second run.
        checks: by arm, whether the output is the baseline's ("equal"), or left it at a place where the target itself
            is undecided within its rounding ("tie"), or is wrong ("bug": its time is void).
    """

    prompt: str
    repeat: int
    runs: dict[str, Run]
    last: Run
    checks: dict[str, Check]

    def log_speedup(self, arm: str) -> float:
        """Return the log speedup: the baseline's time per token, the geometric mean of its two runs, over the arm's."""
        if arm == BASELINE:
            return 0.0
        return (_log_tpot(self.runs[BASELINE]) + _log_tpot(self.last)) / 2 - _log_tpot(self.runs[arm])

    def at(self, length: int) -> Block | None:
        """Return the block as it was when its runs had got to a length; None if the baseline stopped before that."""
        last = self.last.at(length)
        runs = {arm: cut for arm, run in self.runs.items() if (cut := run.at(length)) is not None}
        return replace(self, runs=runs, last=last) if last is not None and BASELINE in runs else None


def _log_tpot(run: Run) -> float:
    """Return the logarithm of the seconds a token took: for equal outputs as good as the time of the whole."""
    return math.log(run.total_s / len(run.tokens))


@dataclass(frozen=True, slots=True)
class Results:
    """What an experiment measured.

    Attributes:
        arms: how each is compared and called, in the preset's order.
        blocks: in the order of measuring; an arm may be missing in some.
        counters_runs: by arm, what its untimed run counted.
        failures: by arm from code, what it did in place of decoding. From then on it was not run.
    """

    arms: list[Arm]
    blocks: list[Block]
    counters_runs: dict[str, CountersRun]
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """Compute the A/A floor, in logarithms, from the two runs of the baseline in each block."""
        noise: dict[str, list[float]] = {}
        for block in self.blocks:
            change = _log_tpot(block.runs[BASELINE]) - _log_tpot(block.last)
            noise.setdefault(block.prompt, []).append(change)
        return noise_floor(list(noise.values()))

    def durations(self, arm: str) -> list[float]:
        """Return the seconds of each of the arm's runs."""
        return [block.runs[arm].total_s for block in self.blocks if arm in block.runs]

    def wrong(self, arm: str) -> list[str]:
        """Return the prompts on which the arm gave other tokens than the baseline."""
        return [block.prompt for block in self.blocks if block.checks.get(arm) == "bug"]

    def records(self) -> dict[str, ArmRecord]:
        """Return the arms' results as they are kept."""
        return {arm.name: self._record(arm) for arm in self.arms}

    def _record(self, arm: Arm) -> ArmRecord:
        blocks = [block for block in self.blocks if arm.name in block.runs]
        checks = [block.checks[arm.name] for block in blocks]
        lengths = {len(cut.tokens) for block in blocks for cut in block.runs[arm.name].cuts}
        shorter = {
            length: [cut for block in blocks if (cut := block.at(length)) is not None] for length in sorted(lengths)
        }
        return ArmRecord(
            rows=_rows(arm.name, blocks),
            bugs=checks.count("bug"),
            ties=checks.count("tie"),
            synthetic=arm.synthetic,
            against=arm.against if any(other.name == arm.against for other in self.arms) else None,
            lossy=arm.lossy,
            peer=arm.peer,
            counters_run=self.counters_runs.get(arm.name, CountersRun()),
            timed=arm.timed,
            options=arm.options,
            failure=self.failures.get(arm.name, ""),
            shorter={length: _rows(arm.name, cuts) for length, cuts in shorter.items()},
        )

    def outputs(self) -> dict[str, str]:
        """Return a digest of the baseline's tokens by prompt: counters are compared where these are the same."""
        return {block.prompt: digest(block.runs[BASELINE].tokens) for block in self.blocks}


def _rows(arm: str, blocks: Sequence[Block]) -> dict[str, Row]:
    """Make an arm's rows from the blocks in which it ran."""
    repeats: dict[str, list[tuple[float, Run, Run]]] = {}
    last_s: dict[str, float] = {}
    for block in blocks:
        # A time from a wrong output is void.
        if arm in block.runs and block.checks[arm] != "bug":
            repeat = (block.log_speedup(arm), block.runs[arm], block.runs[BASELINE])
            repeats.setdefault(block.prompt, []).append(repeat)
            last_s[block.prompt] = last_s.get(block.prompt, 0.0) + block.last.total_s
    rows = {prompt: row_of(*zip(*of_prompt, strict=True)) for prompt, of_prompt in repeats.items()}
    if arm != BASELINE:
        return rows
    return {prompt: replace(row, seconds=replace(row.seconds, last=last_s[prompt])) for prompt, row in rows.items()}


def row_of(log_speedups: Sequence[float], runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    """Sum up the runs of one arm on one prompt. The baseline's runs beside them tell how far the outputs agree."""
    counts = [
        RowCounts(runs=1, tokens=len(run.tokens), agreed=common_prefix(run.tokens, ar.tokens), **as_dict(run.counts))
        for run, ar in zip(runs, baseline, strict=True)
    ]
    seconds = [RowSeconds(total=run.total_s, ttft=run.ttft_s, **as_dict(run.seconds)) for run in runs]
    return Row(
        log_speedup=statistics.fmean(log_speedups),
        counts=total(RowCounts, counts),
        seconds=total(RowSeconds, seconds),
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
) -> Results:
    """Measure the arms against the baseline, which must be among them.

    Args:
        arms: their outputs are checked run by run: against the baseline's, or a lossy arm's against its own reference.
        prompts: tokens by id.
        max_new_tokens: length of every output, unless a stop token of the arms ends it.
        repeats: blocks for each prompt.
        seed: of the order of arms within a block.
        progress: told the number of runs done, of all runs, and what is going on.
        finished: blocks of an earlier run that was interrupted; they are not measured again.
        keep: given each block as soon as it is finished.
    """
    baseline = next(arm for arm in arms if arm.name == BASELINE)
    known = {(block.prompt, block.repeat): block for block in finished}
    planned = [(prompt, repeat) for repeat in range(repeats) for prompt in prompts]
    total = len(arms) + sum(block not in known for block in planned) * (len(arms) + 1)
    done = 0

    def tell(doing: str) -> None:
        nonlocal done
        progress(done, total, doing)
        done += 1

    warm = next(iter(prompts))
    length = min(max_new_tokens, COUNTERS_RUN_TOKENS)
    written = baseline.run(prompts[warm], length, ()).tokens
    counters_runs: dict[str, CountersRun] = {}
    failures: dict[str, str] = {}
    blocks = []
    with closing(arms, failures):
        for arm in arms:
            tell(f"{arm.name} on {warm}, the counters run")
            expected = arm.expected(prompts[warm], written, length)
            with _noted(arm, failures):
                counters_runs[arm.name] = counters_run(arm, prompts[warm], length, expected)
        for prompt, repeat in planned:
            if block := known.get((prompt, repeat)):
                blocks.append(block)
                continue
            working = [arm for arm in arms if arm.name not in failures]
            blocks.append(measure_block(working, prompt, prompts[prompt], max_new_tokens, repeat, seed, tell, failures))
            keep(blocks[-1])
    progress(total, total, "done")
    return Results(list(arms), blocks, counters_runs, failures)


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
) -> Block:
    """Measure the arms, the baseline among them, on one prompt.

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
    """
    baseline = next(arm for arm in arms if arm.name == BASELINE)
    others = [arm for arm in arms if arm is not baseline]
    lossy = [arm for arm in arms if arm.lossy]

    def run(arm: Arm, expected: Sequence[int]) -> Run:
        tell(f"{arm.name} on {prompt}")
        return timed(arm, text, max_new_tokens, expected)

    order = random.Random(f"{seed} {prompt} {repeat}").sample(others, len(others))
    # What is to be written, and the prompt's own shapes, so that the first timed run is not their first.
    written = baseline.run(text, max_new_tokens if lossy else 1, ()).tokens
    references: dict[tuple[LM, CachePolicy], Sequence[int]] = {}
    for arm in lossy:
        if (arm.target, arm.policy) not in references:
            references[arm.target, arm.policy] = arm.expected(text, written, max_new_tokens)
    references_by_arm = {arm.name: references[arm.target, arm.policy] for arm in lossy}
    first = run(baseline, ())
    runs = {baseline.name: first}
    for arm in order:
        with _noted(arm, failures):
            runs[arm.name] = run(arm, references_by_arm.get(arm.name, first.tokens))
    last = run(baseline, ())
    checks = {
        arm.name: classify(
            arm.target, text, references_by_arm.get(arm.name, first.tokens), runs[arm.name].tokens, arm.policy
        )
        for arm in arms
        if arm.name in runs
    }
    losses = {
        tokens: own_losses(baseline.target, text, tokens) for tokens in {tuple(run.tokens) for run in runs.values()}
    }
    runs = {name: with_output_stats(run, losses[tuple(run.tokens)]) for name, run in runs.items()}
    return Block(prompt, repeat, runs, last, checks)


def timed(arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
    """Run the arm once, with garbage collected before it and not during it."""
    gc.collect()
    gc.disable()
    try:
        return arm.run(prompt, length, expected)
    finally:
        gc.enable()
