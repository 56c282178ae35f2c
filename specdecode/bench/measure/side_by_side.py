"""Side-by-side measurement of two versions of a repository, in turns."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run, disturbances
from specdecode.bench.measure.block import steady_run
from specdecode.bench.measure.check import Check
from specdecode.bench.measure.counters import COUNTERS_RUN_TOKENS
from specdecode.bench.measure.experiment import row_of
from specdecode.bench.measure.interleaved import SLICE_S, Interleaver, RunPair, SlicedRun
from specdecode.bench.measure.steady import Steady
from specdecode.bench.measure.until import Until, rounds
from specdecode.bench.measure.versions import Versions, WorkerProcess
from specdecode.bench.runs.counts import lacks_our_counts
from specdecode.bench.runs.looks import tail_of_arm
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import BASELINE, digest
from specdecode.bench.runs.records import ArmRecord
from specdecode.bench.runs.statistics import TAIL, Estimate, contrast, noise_floor, typical_ratio


@dataclass(frozen=True, slots=True)
class VersionRuns:
    """One version's two runs of an arm in a quartet, in order, with the check of each output."""

    runs: tuple[Run, Run]
    checks: tuple[Check, Check]

    @property
    def log_s(self) -> float:
        """Return the mean logarithm of the two runs' seconds per token. Arms may write outputs of different length."""
        return statistics.fmean(math.log(run.s_per_token) for run in self.runs)


@dataclass(frozen=True, slots=True)
class Quartet:
    """Four runs of one arm on one prompt: two by each version, in the order A B B A, or as two interleaved pairs.

    Attributes:
        prompt: id of the prompt.
        new, old: the versions' runs.
        new_first: whether the new version is A.
        pairs: the same runs as interleaved pairs; None if whole runs took turns.
    """

    prompt: str
    new: VersionRuns
    old: VersionRuns
    new_first: bool
    pairs: tuple[RunPair, RunPair] | None = None

    @property
    def log_ratio(self) -> float:
        """Return the logarithm of the old version's time over the new version's. A drift linear in time cancels."""
        if self.pairs is not None:
            return statistics.fmean(pair.log_ratio for pair in self.pairs)
        return self.old.log_s - self.new.log_s

    @property
    def noise(self) -> float:
        """Return the noise of `log_ratio`, which gives the A/A floor of this comparison: it varies as much.

        For pairs it is half of their difference, for whole runs their `contrast`.
        """
        if self.pairs is not None:
            first, second = self.pairs
            return (first.log_ratio - second.log_ratio) / 2
        new, old = ([run.s_per_token for run in side.runs] for side in (self.new, self.old))
        return contrast(new, old, self.new_first)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """The measurements of two versions.

    Attributes:
        blocks: quartets by arm, the reference arm's included, for each prompt and repeat.
        counters_runs: results of the counters runs, by version's name and arm.
        failures: error messages of arms from code that failed, by version's name and arm. A failed arm is not run
            again.
        baselines: the reference arm of each arm, in the same version. The run's reference arm is its own.
        looked: whether the verdicts were computed after each repeat, to decide on further repeats.
        budget_spent: whether the time budget ended the repeats, before all verdicts were clear.
    """

    blocks: list[dict[str, Quartet]]
    counters_runs: dict[tuple[str, str], CountersRun]
    failures: dict[tuple[str, str], str]
    baselines: dict[str, str]
    looked: bool = False
    budget_spent: bool = False

    @property
    def baseline(self) -> str:
        """The name of the run's reference arm."""
        return next(arm for arm, baseline in self.baselines.items() if arm == baseline)

    @property
    def failed(self) -> set[str]:
        """The arms that failed in one of the versions."""
        return {arm for _, arm in self.failures}

    def quartets(self, arm: str) -> list[Quartet]:
        """Return the quartets of an arm."""
        return [block[arm] for block in self.blocks if arm in block]

    def change(self, arm: str) -> Estimate:
        """Return an arm's new speed over its old speed, with an interval."""
        of_all = map(self._looks, self.baselines)
        tail = tail_of_arm(self._looks(arm), of_all, self.budget_spent) if self.looked else TAIL
        return typical_ratio([quartet.log_ratio for quartet in self.quartets(arm)], self.floor(arm), tail)

    def _looks(self, arm: str) -> int:
        """Return the number of looks at an arm's verdict, one after each repeat."""
        return max(Counter(quartet.prompt for quartet in self.quartets(arm)).values(), default=1)

    def floor(self, arm: str | None = None) -> float:
        """Return the A/A floor of an arm's change, in logarithms; the reference arm's floor if `arm` is None."""
        return noise_floor([quartet.noise for quartet in self.quartets(arm or self.baseline)])

    def record(self, version: Literal["new", "old"], name: str, arm: str, about: Mapping[str, Any]) -> ArmRecord:
        """Return one version's results of an arm, in the form of a run file.

        Args:
            version: the version.
            name: name of the version.
            arm: name of the arm.
            about: the worker's entries for the arm: "synthetic", "against", "baseline", "lossy", "timed" and "peer".
        """
        entries: dict[str, list[tuple[Run, Run]]] = {}
        logs: dict[str, list[float]] = {}
        checks: list[Check] = []
        for block in self.blocks:
            if arm not in block:
                continue
            side: VersionRuns = getattr(block[arm], version)
            checks += side.checks
            if self.baseline not in block:
                continue  # a further repeat, which compares only the versions
            reference, baseline = (getattr(block[other], version) for other in (self.baselines[arm], self.baseline))
            # A time from a wrong output is void.
            right = [run for run, check in zip(side.runs, side.checks, strict=True) if check != "bug"]
            if right:
                logs.setdefault(block[arm].prompt, []).append(baseline.log_s - side.log_s)
                entries.setdefault(block[arm].prompt, []).extend((run, reference.runs[0]) for run in right)
        rows = {}
        for prompt, of_prompt in entries.items():
            runs, others = zip(*of_prompt, strict=True)
            rows[prompt] = row_of(logs[prompt], runs, others)
        timed = [run for quartet in self.quartets(arm) for run in getattr(quartet, version).runs]
        return ArmRecord(
            rows=rows,
            bugs=checks.count("bug"),
            ties=checks.count("tie"),
            synthetic=about["synthetic"],
            against=about["against"],
            baseline=about.get("baseline"),
            lossy=about["lossy"],
            # Workers of older versions do not report "peer", and those of still older versions do not report "timed".
            peer=about.get("peer", lacks_our_counts(row.counts for row in rows.values())),
            counters_run=self.counters_runs.get((name, arm), CountersRun()),
            timed=about.get("timed", False),
            failure=self.failures.get((name, arm), ""),
            **disturbances(timed),
            outputs=self.outputs(version, arm) if arm in set(self.baselines.values()) - {self.baseline} else {},
        )

    def outputs(self, version: Literal["new", "old"], arm: str | None = None) -> dict[str, str]:
        """Return digests of an arm's outputs in a version, by prompt; the reference arm's outputs if `arm` is None."""
        quartets = self.quartets(arm or self.baseline)
        return {quartet.prompt: digest(getattr(quartet, version).runs[0].tokens) for quartet in quartets}


def measure_side_by_side(
    both: Versions,
    arms: Sequence[str],
    prompts: dict[str, list[int]],
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
    baseline: str = BASELINE,
    until: Until[SideBySide] | None = None,
    again: float = 1.0,
) -> SideBySide:
    """Run every arm on every prompt in both versions, in turns.

    A turn is a slice of a run: a few steps. If a version is too old to pause within a run, a turn is a whole run. If
    the versions do not fit into memory together, a block runs all its arms in one version, and then all in the other.

    Args:
        both: the versions.
        arms: names of arms that both versions have.
        prompts: tokens by id.
        max_new_tokens: length of every output.
        repeats: least number of quartets of each arm on each prompt.
        progress: called with the number of finished runs, the number of all runs, and a text on the current run.
        baseline: the reference arm, in each version, of arms that name no other.
        until: chooses the arms of further repeats, and when to stop; None for no further repeats.
        again: the most time for measuring disturbed runs again, as a share of the rest.

    Raises:
        ValueError: a version cannot run, or the reference arm fails in it.
    """
    about = both.new.about["about"]
    baselines = {arm: about[arm].get("baseline") or baseline for arm in arms}
    measured = SideBySide([], {}, {}, baselines, looked=until is not None)
    total, done = 4 * len(arms) * len(prompts) * repeats, 0
    new, old = both.new, both.old
    steady = Steady((new.pid, old.pid), torch.device(both.new.about.get("device", "cpu")), again)
    interleaver = Interleaver(steady) if both.pauses else None
    expected: dict[str, dict[tuple[str, str], list[int]]] = {prompt: {} for prompt in prompts}
    tokens_s: dict[str, float] = {}
    for number, (prompt, repeat, chosen) in enumerate(rounds(measured, prompts, repeats, arms, until)):
        # Versions that are loaded in turn always begin with the new one, which is still loaded from the last block.
        new_first = number % 2 == 0 or not both.together
        turns = (new, old, old, new) if new_first else (old, new, new, old)
        # Further repeats compare only the versions, not an arm with the run's reference arm.
        needed = {*chosen, *measured.baselines.values()} if repeat < repeats else set(chosen)
        order = _order(measured, needed, random.Random(number))
        still_open = ""
        if repeat >= repeats:
            still_open = f"; still open: {', '.join(arm for arm in arms if arm in chosen)}"
            total += 4 * len(order)
        block = _BlockRuns(both, measured, prompts[prompt], max_new_tokens, steady, expected[prompt], tokens_s)
        for workers, arm in _plan(turns, order, both.together, interleaver is not None):
            names = " and ".join(worker.name for worker in workers)
            progress(done, total, f"{arm} on {prompt}, {names}{still_open}")
            done += len(workers)
            block.run(workers, arm, interleaver)
        quartets = {arm: block.quartet(prompt, arm, new_first) for arm in order}
        measured.blocks.append({arm: quartet for arm, quartet in quartets.items() if quartet is not None})
    progress(total, total, "done")
    return measured if until is None else replace(measured, budget_spent=until.budget_spent)


def _plan(
    turns: Sequence[WorkerProcess], order: Sequence[str], together: bool, interleaved: bool
) -> list[tuple[tuple[WorkerProcess, ...], str]]:
    """Return the runs of a block: each with the versions that run, one or both in turns, and the arm."""
    if interleaved:
        first, second, *_ = turns
        return [(both, arm) for arm in order for both in ((first, second), (second, first))]
    if together:
        return [((worker,), arm) for arm in order for worker in turns]
    return [((worker,), arm) for worker in turns for arm in order]


def _order(measured: SideBySide, chosen: Collection[str], chance: random.Random) -> list[str]:
    """Return the chosen arms that have not failed: the reference arms, the run's own first, then the rest shuffled."""
    working = [arm for arm in measured.baselines if arm in chosen and arm not in measured.failed]
    baselines = [arm for arm in working if arm in measured.baselines.values()]
    baselines.sort(key=lambda arm: arm != measured.baseline)
    others = [arm for arm in working if arm not in baselines]
    return [*baselines, *chance.sample(others, len(others))]


class _BlockRuns:
    """The runs of both versions on one prompt.

    Args:
        both: the versions.
        measured: results of counters runs and failures are added here.
        prompt: tokens of the prompt.
        length: length of every output.
        steady: measures disturbed runs again.
        expected: the expected output by version's name and arm; the first block of a prompt fills it in.
        tokens_s: about the seconds for one token of each arm; the counters runs fill it in.
    """

    def __init__(
        self,
        both: Versions,
        measured: SideBySide,
        prompt: list[int],
        length: int,
        steady: Steady,
        expected: dict[tuple[str, str], list[int]],
        tokens_s: dict[str, float],
    ) -> None:
        self._steady, self._tokens_s = steady, tokens_s
        self._both, self._measured, self._prompt, self._length = both, measured, prompt, length
        self._runs: dict[tuple[str, str], list[Run]] = {}
        self._pairs: dict[str, list[RunPair]] = {}
        self._expected = expected

    def run(self, workers: Sequence[WorkerProcess], arm: str, interleaver: Interleaver | None) -> None:
        """Run an arm in a version or, with an interleaver, in both by turns, unless it has failed in one of them."""
        baseline = self._measured.baselines[arm]
        for version in [version for version, failed in self._measured.failures if failed == baseline != arm]:
            self._measured.failures[version, arm] = f"arm {arm!r}: its reference arm {baseline} did not decode"
        with suppress(ArmError):  # it is noted
            for worker in workers:
                if arm in self._measured.failed:
                    return
                self._both.use(worker)
                with self._noted(worker, arm):
                    self._prepare(worker, arm)
                    if interleaver is None:
                        run = steady_run(self._steady, partial(worker.run, *self._wanted(worker, arm)))
                        self._add(worker, arm, run)
            if interleaver is not None:
                self._run_pair(workers, arm, interleaver)

    def _run_pair(self, workers: Sequence[WorkerProcess], arm: str, interleaver: Interleaver) -> None:
        new, old = self._both.new, self._both.old
        steps = max(1, round(SLICE_S / self._tokens_s[arm]))

        def sliced(worker: WorkerProcess) -> SlicedRun:
            with self._noted(worker, arm):
                result = yield from worker.slices(*self._wanted(worker, arm), steps)
            return result

        pair = interleaver.measure(lambda: (sliced(new), sliced(old)), new_first=workers[0] is new)
        self._pairs.setdefault(arm, []).append(pair)
        self._add(new, arm, pair.new)
        self._add(old, arm, pair.old)

    @contextmanager
    def _noted(self, worker: WorkerProcess, arm: str) -> Iterator[None]:
        """Note the failure of an arm from code. Raise ValueError if it is the reference arm, which must not fail."""
        try:
            yield
        except ArmError as error:
            if arm == self._measured.baseline:
                raise ValueError(f"{worker.name}: {error}") from None
            self._measured.failures[worker.name, arm] = str(error)
            raise

    def _prepare(self, worker: WorkerProcess, arm: str) -> None:
        """Do what precedes the first timed run of an arm in a version: the counters run, and the prompt's shapes."""
        measured, baseline, key = self._measured, self._measured.baselines[arm], (worker.name, arm)
        if arm != baseline and key not in self._expected:
            written = self._runs[worker.name, baseline][0].tokens  # reference arms run first
            self._expected[key] = worker.ask("expected", arm=arm, prompt=self._prompt, tokens=written)
        _, _, _, correct = self._wanted(worker, arm)
        if key not in measured.counters_runs:
            length = min(self._length, COUNTERS_RUN_TOKENS)
            started = time.perf_counter()
            measured.counters_runs[key] = worker.counters_run(arm, self._prompt, length, correct)
            self._tokens_s[arm] = (time.perf_counter() - started) / length
        elif arm in measured.baselines.values() and key not in self._runs:
            worker.run(arm, self._prompt, 1, correct)

    def _wanted(self, worker: WorkerProcess, arm: str) -> tuple[str, list[int], int, list[int]]:
        """Return the arguments of a run: the arm, the prompt, the length, and the expected output."""
        expected = [] if arm == self._measured.baselines[arm] else self._expected[worker.name, arm]
        return arm, self._prompt, self._length, expected

    def _add(self, worker: WorkerProcess, arm: str, run: Run) -> None:
        self._runs.setdefault((worker.name, arm), []).append(run)
        if arm == self._measured.baselines[arm]:
            self._expected.setdefault((worker.name, arm), run.tokens)

    def quartet(self, prompt: str, arm: str, new_first: bool) -> Quartet | None:
        """Return both versions' runs of an arm, with their checks; None if the arm has failed, or fails in a check."""
        if self._measured.failed & {arm, self._measured.baselines[arm]}:
            return None
        with suppress(ArmError):  # it is noted
            pairs = self._pairs.get(arm)
            new, old = self._side(self._both.new, arm), self._side(self._both.old, arm)
            return Quartet(prompt, new, old, new_first, None if pairs is None else (pairs[0], pairs[1]))
        return None

    def _side(self, worker: WorkerProcess, arm: str) -> VersionRuns:
        first, second = self._runs[worker.name, arm]
        return VersionRuns((first, second), (self._check(worker, arm, first), self._check(worker, arm, second)))

    def _check(self, worker: WorkerProcess, arm: str, run: Run) -> Check:
        expected = self._expected[worker.name, arm]
        if run.tokens == expected:
            return "equal"
        # A version's own servers wrote its outputs. All else is checked by the new version's code.
        judge = worker if worker.about["about"][arm].get("served") else self._both.new
        self._both.use(judge)
        # Versions that do not report "served" do not have this argument.
        knows_baseline = "served" in judge.about["about"][arm]
        optional = {"baseline": self._measured.baselines[arm]} if knows_baseline else {}
        asked = {"arm": arm, "prompt": self._prompt, "expected": expected, "got": run.tokens}
        with self._noted(judge, arm):
            result: Check = judge.ask("check", **asked, **optional)
        return result
