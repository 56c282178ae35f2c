"""Experiments in blocks: the baseline first, the arms in a shuffled order, the baseline again."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.check import Check, classify
from specdecode.bench.measure.counters import rehearse
from specdecode.bench.measure.output_stats import own_losses, told
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, Row, digest
from specdecode.bench.runs.statistics import noise_floor
from specdecode.drafters.base import common_prefix
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy

REHEARSED_TOKENS = 16
"""Length of the untimed run of each arm."""


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
        """Logarithm of the baseline's time per token, of its two runs the geometric mean, over the arm's."""
        if arm == BASELINE:
            return 0.0
        return (_log_tpot(self.runs[BASELINE]) + _log_tpot(self.last)) / 2 - _log_tpot(self.runs[arm])

    def at(self, length: int) -> Block | None:
        """The block as it was when its runs had got to a length; None if the baseline stopped before that."""
        last = self.last.at(length)
        runs = {arm: cut for arm, run in self.runs.items() if (cut := run.at(length)) is not None}
        return replace(self, runs=runs, last=last) if last is not None and BASELINE in runs else None


def _log_tpot(run: Run) -> float:
    """Logarithm of the seconds that a token took: of equal outputs that is as good as the time of the whole."""
    return math.log(run.total_s / len(run.tokens))


@dataclass(frozen=True, slots=True)
class Results:
    """What an experiment measured.

    Attributes:
        arms: how each is compared and called, in the preset's order.
        blocks: in the order of measuring; an arm may be missing in some.
        rehearsals: by arm, what was counted before (see `bench.rehearsal`).
    """

    arms: list[Arm]
    blocks: list[Block]
    rehearsals: dict[str, dict[str, float]]

    @property
    def floor(self) -> float:
        """The A/A floor, in logarithms: from the two runs of the baseline in each block."""
        noise: dict[str, list[float]] = {}
        for block in self.blocks:
            change = _log_tpot(block.runs[BASELINE]) - _log_tpot(block.last)
            noise.setdefault(block.prompt, []).append(change)
        return noise_floor(list(noise.values()))

    def durations(self, arm: str) -> list[float]:
        """Seconds of each of the arm's runs."""
        return [block.runs[arm].total_s for block in self.blocks if arm in block.runs]

    def wrong(self, arm: str) -> list[str]:
        """Prompts on which the arm gave other tokens than the baseline."""
        return [block.prompt for block in self.blocks if block.checks.get(arm) == "bug"]

    def records(self) -> dict[str, ArmRecord]:
        """The arms' results as they are kept."""
        return {arm.name: self._record(arm) for arm in self.arms}

    def _record(self, arm: Arm) -> ArmRecord:
        mine = [block for block in self.blocks if arm.name in block.runs]
        checks = [block.checks[arm.name] for block in mine]
        lengths = {len(cut.tokens) for block in mine for cut in block.runs[arm.name].cuts}
        shorter = {
            length: [cut for block in mine if (cut := block.at(length)) is not None] for length in sorted(lengths)
        }
        return ArmRecord(
            rows=_rows(arm.name, mine),
            bugs=checks.count("bug"),
            ties=checks.count("tie"),
            synthetic=arm.synthetic,
            against=arm.against if any(other.name == arm.against for other in self.arms) else None,
            lossy=arm.lossy,
            rehearsal=self.rehearsals.get(arm.name, {}),
            timed=arm.timed,
            options=arm.options,
            shorter={length: _rows(arm.name, blocks) for length, blocks in shorter.items()},
        )

    def outputs(self) -> dict[str, str]:
        """A digest of the baseline's tokens by prompt: counters are compared where these are the same."""
        return {block.prompt: digest(block.runs[BASELINE].tokens) for block in self.blocks}


def _rows(arm: str, blocks: Sequence[Block]) -> dict[str, Row]:
    """An arm's rows, from the blocks in which it ran."""
    entries: dict[str, list[tuple[float, Run, Run]]] = {}
    for block in blocks:
        # A time from a wrong output is void.
        if arm in block.runs and block.checks[arm] != "bug":
            run = block.runs[arm]
            if arm == BASELINE:
                run = replace(run, seconds=run.seconds | {"last": block.last.total_s})
            entries.setdefault(block.prompt, []).append((block.log_speedup(arm), run, block.runs[BASELINE]))
    return {prompt: row_of(*zip(*of, strict=True)) for prompt, of in entries.items()}


def row_of(log_speedups: Sequence[float], runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    """Runs of one arm on one prompt, summed up; and the baseline's beside them, to compare the outputs."""
    seconds = [{"total": run.total_s, "ttft": run.ttft_s, **run.seconds} for run in runs]
    counts = [
        {"runs": 1, "tokens": len(run.tokens), "agreed": common_prefix(run.tokens, ar.tokens), **run.counts}
        for run, ar in zip(runs, baseline, strict=True)
    ]
    return Row(
        log_speedup=statistics.fmean(log_speedups),
        counts={name: sum(of[name] for of in counts) for name in counts[0]},
        seconds={name: sum(of[name] for of in seconds) for name in seconds[0]},
        histograms={
            name: [sum(column) for column in zip_longest(*(run.histograms[name] for run in runs), fillvalue=0)]
            for name in runs[0].histograms
        },
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
    there = {(block.prompt, block.repeat): block for block in finished}
    planned = [(prompt, repeat) for repeat in range(repeats) for prompt in prompts]
    total = len(arms) + sum(block not in there for block in planned) * (len(arms) + 1)
    done = 0

    def tell(doing: str) -> None:
        nonlocal done
        progress(done, total, doing)
        done += 1

    warm = next(iter(prompts))
    length = min(max_new_tokens, REHEARSED_TOKENS)
    written = baseline.run(prompts[warm], length, ()).tokens
    rehearsals = {}
    for arm in arms:
        tell(f"{arm.name} on {warm}, a rehearsal")
        expected = arm.expected(prompts[warm], written, length)
        rehearsals[arm.name] = rehearse(arm, prompts[warm], length, expected)

    blocks = []
    for prompt, repeat in planned:
        if block := there.get((prompt, repeat)):
            blocks.append(block)
            continue
        blocks.append(measure_block(arms, prompt, prompts[prompt], max_new_tokens, repeat, seed, tell))
        keep(blocks[-1])
    progress(total, total, "done")
    return Results(list(arms), blocks, rehearsals)


def measure_block(
    arms: Sequence[Arm],
    prompt: str,
    text: Sequence[int],
    max_new_tokens: int,
    repeat: int = 0,
    seed: int = 0,
    tell: Callable[[str], None] = lambda doing: None,
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
    owed = {arm.name: references[arm.target, arm.policy] for arm in lossy}
    first = run(baseline, ())
    runs = {baseline.name: first}
    runs |= {arm.name: run(arm, owed.get(arm.name, first.tokens)) for arm in order}
    last = run(baseline, ())
    checks = {
        arm.name: classify(arm.target, text, owed.get(arm.name, first.tokens), runs[arm.name].tokens, arm.policy)
        for arm in arms
    }
    losses = {
        tokens: own_losses(baseline.target, text, tokens) for tokens in {tuple(run.tokens) for run in runs.values()}
    }
    runs = {name: told(run, losses[tuple(run.tokens)]) for name, run in runs.items()}
    return Block(prompt, repeat, runs, last, checks)


def timed(arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
    """One run, with garbage collected before it and not during it."""
    gc.collect()
    gc.disable()
    try:
        return arm.run(prompt, length, expected)
    finally:
        gc.enable()
