"""Two versions of this package side by side on one machine: a worker process for each, in turns."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from specdecode.bench.arms.run import Run
from specdecode.bench.measure.check import Check
from specdecode.bench.measure.counters import COUNTERS_RUN_TOKENS
from specdecode.bench.measure.experiment import row_of
from specdecode.bench.runs.counts import from_dict
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, digest, lacks_our_counts
from specdecode.bench.runs.statistics import Estimate, mean_ratio, noise_floor
from specdecode.support.git import git

PROTOCOL = 3
"""Version of the requests to a worker and of its answers."""

_WORKER = Path("specdecode") / "bench" / "worker.py"


class WorkerProcess:
    """A version of the package that measures on demand, in a process of its own (`bench.worker`).

    Args:
        name: of the version, for messages.
        folder: of its source.
        arguments: of its `load`.

    Raises:
        ValueError: the version cannot be measured; the sentence says why.
    """

    def __init__(self, name: str, folder: Path, arguments: Mapping[str, Any]) -> None:
        if not (folder / _WORKER).exists():
            raise ValueError(f"{name} cannot be measured side by side: it has no {_WORKER.as_posix()}")
        self.name = name
        self._arguments = dict(arguments)
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "specdecode.bench.worker"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )
        self.about: dict[str, Any] = {}

    def load(self) -> bool:
        """Load the models; False if there is no memory for them."""
        answer = self._answer("load", self._arguments)
        if answer.get("memory"):
            return False
        self.about = self._value(answer, "load")
        if self.about["protocol"] != PROTOCOL:
            raise ValueError(f"{self.name} cannot be measured side by side: its worker is of another protocol")
        return True

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return the worker's answer to a request.

        Raises:
            ValueError: the worker refuses, or is dead; the sentence says which.
        """
        return self._value(self._answer(do, arguments), do)

    def run(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        """Time one run of an arm."""
        return Run.from_json(self.ask("run", arm=arm, prompt=prompt, length=length, expected=expected))

    def counters_run(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int]) -> CountersRun:
        """Run the arm once, untimed, and count."""
        counted = self.ask("rehearse", arm=arm, prompt=prompt, length=length, expected=expected)
        return from_dict(CountersRun, counted)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def _answer(self, do: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, json.JSONDecodeError):
            code = self._process.wait()
            self._words.seek(0)
            words = self._words.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            what = " ".join([do, str(arguments.get("arm", ""))]).strip()
            raise ValueError(
                f"the worker of {self.name} died while it was to {what} (exit code {code}); its last words: {words[-1]}"
            ) from None
        return answer

    def _value(self, answer: dict[str, Any], do: str) -> Any:
        if "error" in answer:
            raise ValueError(f"{self.name} cannot {do}: {answer['error']}")
        return answer["value"]


class Versions:
    """Two versions, and whose models are in memory: both, or each in its turn where there is no room for two.

    Attributes:
        new, old: the workers.
        together: both versions' models are in memory.

    Raises:
        ValueError: a version cannot be loaded; the sentence says why.
    """

    def __init__(self, new: WorkerProcess, old: WorkerProcess) -> None:
        self.new, self.old = new, old
        self.together = False
        self._loaded: WorkerProcess | None = None
        self.use(new)
        self.together = old.load()
        self.use(old)

    def use(self, worker: WorkerProcess) -> None:
        """Make sure that the worker's models are in memory."""
        if self.together or self._loaded is worker:
            return
        if self._loaded is not None:
            self._loaded.ask("unload")
        if not worker.load():
            raise ValueError(f"{worker.name} cannot load its models: even alone they do not fit into memory")
        self._loaded = worker


@contextmanager
def versions(root: Path, ref: str, arguments: Mapping[str, Any]) -> Iterator[Versions]:
    """The working tree and another commit, as workers that have loaded their models.

    Args:
        root: of the repository.
        ref: the commit.
        arguments: of the workers' `load`.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(_worktree(root, ref))
        workers = []
        for name, source in (("the working tree", root), (ref, folder)):
            workers.append(WorkerProcess(name, source, arguments))
            stack.callback(workers[-1].close)
        yield Versions(*workers)


@contextmanager
def _worktree(root: Path, ref: str) -> Iterator[Path]:
    """The repository's files at another commit, in a folder that is gone afterwards.

    Raises:
        ValueError: no such commit, or no repository.
    """
    with tempfile.TemporaryDirectory(prefix="specdecode-") as scratch:
        folder = Path(scratch) / "against"
        try:
            git("worktree", "add", "--detach", str(folder), ref, root=root)
        except ValueError as error:
            raise ValueError(f"--against {ref}: {error}") from None
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder), root=root)


@dataclass(frozen=True, slots=True)
class Side:
    """One version's two runs of an arm in a quartet, in order, and whether each wrote what its version's `ar` did."""

    runs: tuple[Run, Run]
    checks: tuple[Check, Check]

    @property
    def log_s(self) -> float:
        """Return the logarithm of the runs' seconds, mean of the two."""
        return (math.log(self.runs[0].total_s) + math.log(self.runs[1].total_s)) / 2


@dataclass(frozen=True, slots=True)
class Quartet:
    """One arm on one prompt, run by both versions twice in the order A B B A.

    Attributes:
        prompt: its id.
        new, old: the versions' runs.
        new_first: whether the new version is A.
    """

    prompt: str
    new: Side
    old: Side
    new_first: bool

    @property
    def log_ratio(self) -> float:
        """Return the logarithm of the old version's time over the new one's. A drift linear in time cancels."""
        return self.old.log_s - self.new.log_s

    @property
    def noise(self) -> float:
        """Return the same statistic between equal versions: the cubic contrast (-1, 3, -3, 1) of the four runs.

        It compares only runs of the same version with one another, is untouched by a linear drift, and, divided by the
        root of 20, varies as much as `log_ratio` does: the A/A floor of this very comparison.
        """
        outer, inner = (self.new, self.old) if self.new_first else (self.old, self.new)
        return (_log_change(outer.runs) - 3 * _log_change(inner.runs)) / math.sqrt(20)


def _log_change(runs: tuple[Run, Run]) -> float:
    return math.log(runs[1].total_s) - math.log(runs[0].total_s)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What was measured of two versions.

    Attributes:
        blocks: for each prompt and repeat, the quartets by arm, `ar` among them.
        counters_runs: what the untimed runs counted, by version's name and arm.
    """

    blocks: list[dict[str, Quartet]]
    counters_runs: dict[tuple[str, str], CountersRun]

    def change(self, arm: str) -> Estimate:
        """Return the new speed over the old, with its interval."""
        logs = self._by_prompt(arm, lambda quartet: quartet.log_ratio)
        return mean_ratio(logs, self.floor(arm))

    def floor(self, arm: str = BASELINE) -> float:
        """Return the A/A floor of an arm's change, in logarithms."""
        return noise_floor(self._by_prompt(arm, lambda quartet: quartet.noise))

    def record(self, version: Literal["new", "old"], name: str, arm: str, about: Mapping[str, Any]) -> ArmRecord:
        """Return one version's results of an arm, as they are kept.

        Args:
            version: whose.
            name: of the version.
            arm: its name.
            about: what the version says of the arm: "synthetic", "against", "lossy", "timed" and "peer".
        """
        entries: dict[str, list[tuple[float, Run, Run]]] = {}
        checks: list[Check] = []
        for block in self.blocks:
            side, ar = getattr(block[arm], version), getattr(block[BASELINE], version)
            checks += side.checks
            # A time from a wrong output is void.
            right = [run for run, check in zip(side.runs, side.checks, strict=True) if check != "bug"]
            entries.setdefault(block[arm].prompt, []).extend((ar.log_s - side.log_s, run, ar.runs[0]) for run in right)
        rows = {prompt: row_of(*zip(*runs, strict=True)) for prompt, runs in entries.items() if runs}
        return ArmRecord(
            rows=rows,
            bugs=checks.count("bug"),
            ties=checks.count("tie"),
            synthetic=about["synthetic"],
            against=about["against"],
            lossy=about["lossy"],
            # Older versions do not say whose an arm is, and still older ones have none that follow the clock.
            peer=about.get("peer", lacks_our_counts(rows)),
            counters_run=self.counters_runs[name, arm],
            timed=about.get("timed", False),
        )

    def outputs(self, version: Literal["new", "old"]) -> dict[str, str]:
        """Return a digest of what the version's `ar` wrote, by prompt."""
        quartets = [block[BASELINE] for block in self.blocks]
        return {quartet.prompt: digest(getattr(quartet, version).runs[0].tokens) for quartet in quartets}

    def _by_prompt(self, arm: str, value: Callable[[Quartet], float]) -> list[list[float]]:
        values: dict[str, list[float]] = {}
        for block in self.blocks:
            values.setdefault(block[arm].prompt, []).append(value(block[arm]))
        return list(values.values())


def measure_side_by_side(
    both: Versions,
    arms: Sequence[str],
    prompts: dict[str, list[int]],
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[int, int, str], None] = lambda done, total, doing: None,
    seed: int = 0,
) -> SideBySide:
    """Run every arm on every prompt in both versions.

    Args:
        both: the versions.
        arms: names, the baseline first; both versions have them.
        prompts: tokens by id.
        max_new_tokens: length of every output.
        repeats: quartets of each arm on each prompt. Where the versions are not in memory together, all arms of a block
            are run in one version before the other's turn.
        progress: told the number of runs done, of all runs, and what is going on.
        seed: of the order of arms within a block.
    """
    measured = SideBySide([], {})
    total, done = 4 * len(arms) * len(prompts) * repeats, 0
    new, old = both.new, both.old
    others = [arm for arm in arms if arm != BASELINE]
    for number, prompt in enumerate([prompt for _ in range(repeats) for prompt in prompts]):
        tokens = prompts[prompt]
        # In turns the next block begins with the version that this one ends with.
        new_first = number % 2 == 0 or not both.together
        turns = (new, old, old, new) if new_first else (old, new, new, old)
        order = [BASELINE, *random.Random(f"{seed} {number}").sample(others, len(others))]
        plan = [(worker, arm) for arm in order for worker in turns]
        if not both.together:
            plan = [(worker, arm) for worker in turns for arm in order]
        runs: dict[tuple[str, str], list[Run]] = {}
        expected: dict[tuple[str, str], list[int]] = {}
        for worker, arm in plan:
            progress(done, total, f"{arm} on {prompt}, {worker.name}")
            done += 1
            both.use(worker)
            key = (worker.name, arm)
            correct: list[int] = []
            if arm != BASELINE:
                if key not in expected:
                    written = expected[worker.name, BASELINE]
                    expected[key] = worker.ask("expected", arm=arm, prompt=tokens, tokens=written)
                correct = expected[key]
            if key not in measured.counters_runs:
                length = min(max_new_tokens, COUNTERS_RUN_TOKENS)
                measured.counters_runs[key] = worker.counters_run(arm, tokens, length, correct)
            elif arm == BASELINE and key not in runs:
                worker.run(arm, tokens, 1, [])  # the prompt's own shapes: no timed run is their first
            run = worker.run(arm, tokens, max_new_tokens, correct)
            runs.setdefault(key, []).append(run)
            if arm == BASELINE:
                expected.setdefault(key, run.tokens)
        sides = {key: _checked(both, key[1], tokens, expected[key], pair) for key, pair in runs.items()}
        measured.blocks.append(
            {arm: Quartet(prompt, sides[new.name, arm], sides[old.name, arm], new_first) for arm in arms}
        )
    progress(total, total, "done")
    return measured


def _checked(both: Versions, arm: str, prompt: list[int], expected: list[int], runs: Sequence[Run]) -> Side:
    def check(got: list[int]) -> Check:
        if got == expected:
            return "equal"
        both.use(both.new)
        result: Check = both.new.ask("check", arm=arm, prompt=prompt, expected=expected, got=got)
        return result

    first, second = runs
    return Side((first, second), (check(first.tokens), check(second.tokens)))


def dependencies(root: Path, ref: str) -> list[str]:
    """Return the packages that another commit pins otherwise: "NAME THEIRS -> OURS"."""
    pins = []
    for text in (_constraints(root, ref), _constraints(root, None)):
        lines = [line.split(";")[0].strip().split("==") for line in text.splitlines() if "==" in line]
        pins.append({name: version for name, version in lines})
    theirs, ours = pins
    return [
        f"{name} {theirs.get(name, 'none')} -> {ours.get(name, 'none')}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]


def _constraints(root: Path, ref: str | None) -> str:
    try:
        if ref is not None:
            return git("show", f"{ref}:./constraints.txt", root=root)
        return (root / "constraints.txt").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
