"""Experiments: blocks of runs, prompt by prompt and repeat by repeat."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.run import Run, disturbances
from specdecode.bench.measure.block import Block, baselines_of, closing, measure_block, named, noted
from specdecode.bench.measure.counters import COUNTERS_RUN_TOKENS, counters_run
from specdecode.bench.measure.drift import Drift
from specdecode.bench.measure.steady import Steady
from specdecode.bench.measure.turns import Turns
from specdecode.bench.measure.until import Until, rounds
from specdecode.bench.runs.counts import RowCounts, RowSeconds, all_latencies, as_dict, total, total_histograms
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import BASELINE, digest
from specdecode.bench.runs.records import ArmRecord, Row
from specdecode.bench.runs.statistics import noise_floor
from specdecode.core.ranks import Ranks
from specdecode.drafters.base import common_prefix


@dataclass(frozen=True, slots=True)
class Results:
    """The results of an experiment.

    Attributes:
        arms: the arms, in the preset's order.
        blocks: the blocks, in the order of measuring; an arm may be missing in some.
        counters_runs: results of the counters runs, by arm.
        failures: error messages of arms from code that failed, by arm. A failed arm is not run again.
        baseline: the reference arm of arms that name no other.
    """

    arms: list[Arm]
    blocks: list[Block]
    counters_runs: dict[str, CountersRun]
    failures: dict[str, str] = field(default_factory=dict)
    baseline: str = BASELINE

    @property
    def floor(self) -> float:
        """Compute the A/A floor, in logarithms, from the runs of the reference arm in each block."""
        return noise_floor([block.noise(self.baseline) for block in self.blocks])

    def durations(self, arm: str) -> list[float]:
        """Return the seconds of each of the arm's runs."""
        return [block.runs[arm].total_s for block in self.blocks if arm in block.runs]

    def wrong(self, arm: str) -> list[str]:
        """Return the prompts on which the arm's output is wrong."""
        return [block.prompt for block in self.blocks if block.checks.get(arm) == "bug"]

    def records(self) -> dict[str, ArmRecord]:
        """Return the arms' results in the form of a run file."""
        return {arm.name: self._record(arm) for arm in self.arms}

    def _record(self, arm: Arm) -> ArmRecord:
        blocks = [block for block in self.blocks if arm.name in block.runs]
        checks = [block.checks[arm.name] for block in blocks]
        lengths = {len(cut.tokens) for block in blocks for cut in block.runs[arm.name].cuts}
        named = {other.baseline for other in self.arms}
        timed = [run for block in blocks for runs in (block.runs, block.last) if (run := runs.get(arm.name))]
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
            **disturbances(timed),
        )

    def _rows(self, arm: Arm, blocks: Sequence[Block]) -> dict[str, Row]:
        """Return an arm's rows by prompt. Speedups are over the run's reference arm, even if the arm names another."""
        baseline = arm.baseline or self.baseline
        repeats: dict[str, list[tuple[int, float, Run, Run]]] = {}
        last_s: dict[str, float] = {}
        for block in blocks:
            # A time from a wrong output is void.
            if {arm.name, baseline, self.baseline} <= block.runs.keys() and block.checks[arm.name] != "bug":
                log_speedup = block.log_speedup(arm.name, self.baseline)
                repeat = (block.repeat, log_speedup, block.runs[arm.name], block.runs[baseline])
                repeats.setdefault(block.prompt, []).append(repeat)
                if arm.name in block.last:
                    last_s[block.prompt] = last_s.get(block.prompt, 0.0) + block.last[arm.name].total_s
        rows = {}
        for prompt, of_prompt in repeats.items():
            numbers, logs, runs, others = zip(*of_prompt, strict=True)
            rows[prompt] = row_of(logs, runs, others, numbers=numbers, last_s=last_s.get(prompt))
        return rows

    def outputs(self, baseline: str | None = None) -> dict[str, str]:
        """Return digests of a reference arm's outputs by prompt; of the run's reference arm if None.

        The gate compares counters only on prompts with equal digests.
        """
        arm = baseline or self.baseline
        return {block.prompt: digest(block.runs[arm].tokens) for block in self.blocks if arm in block.runs}


def row_of(
    logs: Sequence[float],
    runs: Sequence[Run],
    baseline: Sequence[Run],
    *,
    numbers: Sequence[int] = (),
    last_s: float | None = None,
) -> Row:
    """Return the sums over the runs of one arm on one prompt.

    Args:
        logs: logarithms of its speedups over the run's reference arm, one for each repeat.
        runs: runs of the arm.
        baseline: run of its own reference arm for each of them, to count the tokens that agree.
        numbers: number of each repeat, from 0; none if no repeat was skipped.
        last_s: seconds of the last runs, if it is a reference arm.
    """
    counts = [
        RowCounts(runs=1, tokens=len(run.tokens), agreed=_agreed(run, other), **as_dict(run.counts))
        for run, other in zip(runs, baseline, strict=True)
    ]
    seconds = [RowSeconds(total=run.total_s, ttft=run.ttft_s, **as_dict(run.seconds)) for run in runs]
    return Row(
        log_speedup=statistics.fmean(logs),
        counts=total(RowCounts, counts),
        seconds=replace(total(RowSeconds, seconds), last=last_s),
        histograms=total_histograms(run.histograms for run in runs),
        latencies=all_latencies(run.latencies for run in runs),
        logs=list(logs) if len(logs) > 1 else [],
        repeat_numbers=[] if list(numbers) == list(range(len(numbers))) else list(numbers),
    )


def _agreed(run: Run, baseline: Run) -> float:
    """Return the number of a run's tokens before the first that differs from its reference arm's.

    If a server decoded another number of prompts than its reference arm, the count over the shared tokens is scaled up.
    """
    agreed = common_prefix(run.tokens, baseline.tokens)
    if len(run.latencies.ttft) == len(baseline.latencies.ttft):
        return agreed
    return agreed * len(run.tokens) / min(len(run.tokens), len(baseline.tokens))


def experiment(
    arms: Sequence[Arm],
    prompts: dict[str, list[int]],
    max_new_tokens: int,
    repeats: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
    finished: Sequence[Block] = (),
    failures: Mapping[str, str] = MappingProxyType({}),
    keep: Callable[[Results], None] = lambda results: None,
    baseline: str = BASELINE,
    until: Until[Results] | None = None,
    again: float = 1.0,
    in_turns: bool = False,
) -> Results:
    """Measure the arms against their reference arms.

    Args:
        arms: the arms, reference arms included. Each output is checked against the reference arm's, or for a lossy arm
            against its own reference.
        prompts: tokens by id.
        max_new_tokens: length of every output, unless a stop token of the arms ends it.
        repeats: least number of blocks for each prompt.
        progress: called with the number of finished runs, the number of all runs, and a text on the current run.
        finished: finished blocks of an interrupted run; they are not measured again.
        failures: error messages of arms that failed in it; they are not run again.
        keep: called after each new block with the results so far; their last block is the new one.
        baseline: the reference arm of arms that name no other.
        until: chooses the arms of further repeats, and when to stop; None for no further repeats.
        again: the most time for measuring disturbed runs again, as a share of the rest.
        in_turns: whether each run takes turns with the reference arm. `turns.reason_against` must give no reason.

    Raises:
        ArmError: the reference arm is an arm from code, and does not decode.
    """
    known = {(block.prompt, block.repeat): block for block in finished}
    results = Results(list(arms), [], {}, dict(failures), baseline)
    drift = Drift()
    # Beside the arms' runs, there is one for the expected outputs: before the counters runs, and in each block.
    done, total, still_open = 0, 1 + len(arms) + len(_early_servers(arms)), ""

    def tell(doing: str) -> None:
        nonlocal done
        progress(done, total, doing + still_open)
        done += 1

    warm = next(iter(prompts))
    with closing(arms, results.failures):
        per_block = _runs_of_block(arms, baseline, in_turns)
        total += per_block * (repeats * len(prompts) - sum(block.repeat < repeats for block in finished))
        target = named(arms, baseline).target
        ranks = Ranks() if target is None else target.ranks
        _warm_up(results, ranks, warm, prompts[warm], min(max_new_tokens, COUNTERS_RUN_TOKENS), tell)
        steady = Steady(_workers(arms), None if target is None else target.device, again, agreed=ranks.agreed)
        turns = Turns(named(arms, baseline), steady) if in_turns else None
        rules: dict[str, Any] = {"tell": tell, "failures": results.failures, "steady": steady, "turns": turns}
        everything = [arm.name for arm in arms]
        for prompt, repeat, chosen in rounds(results, prompts, repeats, everything, until):
            block = known.get((prompt, repeat))
            if block is None:
                working = _working(results, chosen)
                if repeat >= repeats:
                    still_open = f"; still open: {', '.join(arm for arm in everything if arm in chosen)}"
                    total += _runs_of_block(working, baseline, in_turns)
                rules |= {"baseline": baseline, "parts": drift.parts}
                block = measure_block(working, prompt, prompts[prompt], max_new_tokens, repeat, **rules)
            results.blocks.append(block)
            if (prompt, repeat) not in known:
                keep(results)
            drift.add(*block.drift(baseline))
    progress(total, total, "done")
    return results


def _runs_of_block(arms: Sequence[Arm], baseline: str, in_turns: bool) -> int:
    """Return the number of runs of a block, with the one for the expected output."""
    return 1 + len(arms) + (0 if in_turns else len(baselines_of(arms, baseline)))


def _early_servers(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms with a server that starts before all runs. A server that runs alone starts when needed."""
    return [arm for arm in arms if arm.server is not None and not arm.server.server.spec.alone]


def _warm_up(
    results: Results, ranks: Ranks, prompt: str, text: Sequence[int], length: int, tell: Callable[[str], None]
) -> None:
    """Start the servers, and do the counters run of each arm on one prompt."""
    baseline = results.baseline

    def failures(arm: Arm) -> dict[str, str] | None:
        return None if arm.name == baseline else results.failures

    for arm in _early_servers(results.arms):
        if arm.name in results.failures:
            continue
        tell(f"{arm.name}, its server starts")
        with noted(arm, failures(arm)):
            assert arm.server is not None
            arm.server.open()
    tell(f"expected outputs on {prompt}")
    written = named(results.arms, baseline).run(text, length, ()).tokens
    for arm in results.arms:
        if arm.name in results.failures:
            continue
        tell(f"{arm.name} on {prompt}, the counters run")
        with noted(arm, failures(arm)):
            counted = counters_run(arm, text, length, arm.expected(text, written, length))
            results.counters_runs[arm.name] = ranks.agreed(counted)


def _workers(arms: Sequence[Arm]) -> set[int]:
    """Return the ids of the servers' processes."""
    return {pid for arm in arms if arm.server is not None for pid in arm.server.server.pids}


def _working(results: Results, chosen: Collection[str]) -> list[Arm]:
    """Return the chosen arms and their reference arms, without failed arms."""
    needed = {results.baseline, *chosen} | {arm.baseline for arm in results.arms if arm.name in chosen}
    return [arm for arm in results.arms if arm.name in needed and arm.name not in results.failures]
