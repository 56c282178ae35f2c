from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdecode.bench.arms.callables import NO_MEMORY, ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.interleaved import RunPair, SlicedRun
from specdecode.bench.measure.side_by_side import Quartet, SideBySide, VersionRuns, measure_side_by_side
from specdecode.bench.measure.until import Until
from specdecode.bench.measure.versions import PROTOCOL, Versions, WorkerProcess, _found_from, dependencies
from specdecode.bench.runs.counts import Counts
from specdecode.bench.runs.looks import tail_of_look
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.statistics import typical_ratio
from specdecode.bench.worker import serve
from specdecode.support.worktree import worktree
from tests.helpers.characters import save
from tests.helpers.repository import commit, edit, git, package_repository, slow_down_verification
from tests.helpers.spelling import CHARACTERS
from tests.helpers.suites import ELSEWHERE, run_pytest

LOGS = st.floats(-1, 1)
RUN = Run([1], 1.0, 0.1, Counts(steps=1))
SIDE = VersionRuns((RUN, RUN), ("equal", "equal"))


def quartet(logs: Sequence[float], new_first: bool) -> Quartet:
    """Return four runs in the order of measuring that took exp(log) seconds each."""
    a_1, b_1, b_2, a_2 = (Run([1], math.exp(log), 0.1, Counts(steps=1)) for log in logs)
    outer, inner = (VersionRuns(runs, ("equal", "equal")) for runs in ((a_1, a_2), (b_1, b_2)))
    return Quartet("p", outer, inner, True) if new_first else Quartet("p", inner, outer, False)


@given(level=LOGS, drift=LOGS, effect=LOGS, new_first=st.booleans())
def test_a_linear_drift_neither_looks_like_a_change_nor_like_noise(
    level: float, drift: float, effect: float, new_first: bool
) -> None:
    """Guards against a machine that warms up reported as a regression, and a regression dismissed as noise."""
    slower = [not new_first, new_first, new_first, not new_first]  # where the old version runs
    logs = [level + drift * i + effect * old for i, old in enumerate(slower)]
    found = quartet(logs, new_first)
    assert found.log_ratio == pytest.approx(effect, abs=1e-9)
    assert found.noise == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("new_first", [True, False])
def test_the_floor_varies_as_much_as_what_it_is_the_floor_of(new_first: bool) -> None:
    """Guards against an A/A floor of another scale: equal independent noise in the four runs must move floor and change
    alike.
    """
    moves = [quartet([float(i == j) for j in range(4)], new_first) for i in range(4)]
    assert sum(move.log_ratio**2 for move in moves) == pytest.approx(1.0)
    assert sum(move.noise**2 for move in moves) == pytest.approx(1.0)
    assert sum(move.noise * move.log_ratio for move in moves) == pytest.approx(0.0)


class Machine:
    """A GPU with room for so many versions, and the log of its runs."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.loaded: list[str] = []
        self.log: list[tuple[str, str, str]] = []


class Loaded(WorkerProcess):
    """A stand-in for a worker process: it answers at once, and does not load a model that does not fit."""

    pid = os.getpid()
    takes_turns = False

    def __init__(self, machine: Machine, name: str, size: int = 1) -> None:
        self.machine, self.name, self.size = machine, name, size
        self.about = {"about": {"ar": {}, "x": {}}}

    def load(self) -> bool:
        if len(self.machine.loaded) + self.size > self.machine.room:
            return False
        self.machine.loaded.append(self.name)
        return True

    def ask(self, do: str, **arguments: Any) -> Any:
        if do == "unload":
            self.machine.loaded.remove(self.name)
            return None
        assert self.name in self.machine.loaded
        answers = {"rehearse": {"host_syncs_per_step": 1.0}, "expected": arguments.get("tokens"), "check": "equal"}
        return answers[do]

    def run(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        assert self.name in self.machine.loaded
        if length > 1:
            self.machine.log.append((self.name, arm, str(prompt)))
            assert expected == ([] if arm == "ar" else [7] * length)
        return Run([7] * length, 2.0 if self.name == "old" else 1.0, 0.1, Counts(steps=length))


def side_by_side(machine: Machine) -> tuple[SideBySide, Versions]:
    both = Versions(Loaded(machine, "new"), Loaded(machine, "old"))
    return measure_side_by_side(both, ["ar", "x"], {"p": [1], "q": [2]}, 5, repeats=2), both


@pytest.mark.parametrize("room", [1, 2])
def test_versions_take_turns(room: int) -> None:
    """Guards against one version that always runs first, and against two models loaded where only one fits."""
    machine = Machine(room)
    measured, both = side_by_side(machine)
    assert both.together == (room == 2)
    assert len(machine.loaded) == room
    assert len(machine.log) == 4 * 2 * 2 * 2
    for arm in ("ar", "x"):
        orders = [name for name, of, _ in machine.log if of == arm]
        blocks = [tuple(orders[i : i + 4]) for i in range(0, len(orders), 4)]
        abba, baab = ("new", "old", "old", "new"), ("old", "new", "new", "old")
        assert blocks == ([abba, baab, abba, baab] if room == 2 else [abba] * 4)
        assert measured.change(arm).value == pytest.approx(2.0)
    record = measured.record("old", "old", "x", {"synthetic": False, "against": None, "lossy": False})
    assert {prompt: row.counts.runs for prompt, row in record.rows.items()} == {"p": 4, "q": 4}
    assert record.counters_run == CountersRun(host_syncs_per_step=1.0)
    # An older version reports neither. For a peer it counts only the steps.
    assert (record.timed, record.peer) == (False, True)
    about = {"synthetic": False, "against": None, "lossy": False, "timed": True, "peer": False}
    record = measured.record("new", "new", "x", about)
    assert (record.timed, record.peer) == (True, False)


class Pausing(Loaded):
    """A worker that pauses after each slice of its runs. The old version takes twice as long."""

    def __init__(self, machine: Machine, name: str, fails: str = "") -> None:
        super().__init__(machine, name)
        self.about["slices"], self.fails = True, fails
        self.steps: set[int] = set()

    def slices(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int], steps: int) -> SlicedRun:
        self.steps.add(steps)
        run = self.run(arm, prompt, length, expected)
        yield
        self.machine.log.append((self.name, arm, str(prompt)))
        if arm == self.fails:
            raise ArmError("it broke")
        return run, [run.total_s / 4, run.total_s * 3 / 4]


def test_versions_take_turns_within_their_runs() -> None:
    """Guards against whole runs of one version after the other, where both can pause."""
    machine = Machine(2)
    both = Versions(Pausing(machine, "new"), Pausing(machine, "old"))
    measured = measure_side_by_side(both, ["ar", "x"], {"p": [1], "q": [2]}, 5, repeats=1)
    abba, baab = ["new", "old", "old", "new"], ["old", "new", "new", "old"]
    assert [name for name, arm, _ in machine.log if arm == "x"] == [*abba, *baab, *baab, *abba]
    assert [measured.change(arm).value for arm in ("ar", "x")] == pytest.approx([2.0, 2.0])
    assert measured.floor("x") == pytest.approx(0.0, abs=1e-9)
    assert min(both.new.steps) >= 1  # type: ignore[attr-defined]
    record = measured.record("old", "old", "x", {"synthetic": False, "against": None, "lossy": False})
    assert {prompt: row.counts.runs for prompt, row in record.rows.items()} == {"p": 2, "q": 2}
    assert (record.slices, record.left_out) == (2 * 2 * 2, 0)


def test_a_version_that_cannot_pause_is_measured_in_whole_runs() -> None:
    """Guards against a request that a commit from before slices does not know."""
    machine = Machine(2)
    both = Versions(Pausing(machine, "new"), Loaded(machine, "old"))
    measured = measure_side_by_side(both, ["ar", "x"], {"p": [1]}, 5, repeats=1)
    assert [name for name, arm, _ in machine.log if arm == "x"] == ["new", "old", "old", "new"]
    assert measured.change("x").value == pytest.approx(2.0)


def test_an_arm_that_fails_between_slices_fails_alone() -> None:
    """Guards against a failure in one version that stops the other arms, or is blamed on the other version."""
    machine = Machine(2)
    both = Versions(Pausing(machine, "new"), Pausing(machine, "old", fails="x"))
    measured = measure_side_by_side(both, ["ar", "x"], {"p": [1], "q": [2]}, 5, repeats=1)
    assert measured.failures == {("old", "x"): "it broke"}
    assert [set(block) for block in measured.blocks] == [{"ar"}, {"ar"}]

    machine = Machine(2)
    both = Versions(Pausing(machine, "new"), Pausing(machine, "old", fails="x"))
    for worker in (both.new, both.old):
        worker.about["about"] = {"ar": {}, "x": {}, "y": {"baseline": "x"}}
    measured = measure_side_by_side(both, ["ar", "x", "y"], {"p": [1], "q": [2]}, 5, repeats=1)
    told = {("old", "x"): "it broke", ("old", "y"): "arm 'y': its reference arm x did not decode"}
    assert measured.failures == told

    both = Versions(Pausing(Machine(2), "new", fails="ar"), Pausing(Machine(2), "old"))
    with pytest.raises(ValueError, match="new: it broke"):
        measure_side_by_side(both, ["ar"], {"p": [1]}, 5, repeats=1)


@pytest.mark.parametrize("new_first", [True, False])
def test_the_floor_of_pairs_varies_as_much_as_what_it_is_the_floor_of(new_first: bool) -> None:
    """Guards against an A/A floor of pairs of another scale, or one that a slower version widens."""

    def found(first: float, second: float) -> Quartet:
        pairs = (RunPair(RUN, RUN, (1.0, math.exp(log))) for log in (first, second))
        return Quartet("p", SIDE, SIDE, new_first, (next(pairs), next(pairs)))

    moves = [found(1.0, 0.0), found(0.0, 1.0)]
    assert sum(move.log_ratio**2 for move in moves) == pytest.approx(sum(move.noise**2 for move in moves))
    assert sum(move.noise * move.log_ratio for move in moves) == pytest.approx(0.0)
    assert (found(0.3, 0.3).log_ratio, found(0.3, 0.3).noise) == (pytest.approx(0.3), 0.0)


class Several(Loaded):
    """A worker whose arms other than `ar` write two outputs in a run, in twice the time. It records what they must
    write.
    """

    def __init__(self, machine: Machine, name: str) -> None:
        super().__init__(machine, name)
        self.about = {"about": {"ar": {}, "many": {}, "drafting": {"baseline": "many"}}}
        self.expected: dict[str, list[int]] = {}

    def ask(self, do: str, **arguments: Any) -> Any:
        if do == "expected":
            self.expected[arguments["arm"]] = arguments["tokens"]
        return super().ask(do, **arguments)

    def run(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        if arm == "ar":
            return Run([7] * length, 1.0, 0.1, Counts(steps=length))
        return Run([8] * 2 * length, 2.0, 0.1, Counts(steps=length))


def test_an_arm_is_checked_against_what_its_own_reference_arm_wrote() -> None:
    """Guards against right outputs called wrong, because their reference arm writes several prompts at a time or is
    lossy, and against a speedup off by the number of prompts.
    """
    machine = Machine(2)
    both = Versions(Several(machine, "new"), Several(machine, "old"))
    measured = measure_side_by_side(both, ["ar", "many", "drafting"], {"p": [1]}, 5, repeats=2)
    assert both.new.expected == {"many": [7] * 5, "drafting": [8] * 10}  # type: ignore[attr-defined]
    about = {"synthetic": False, "against": None, "lossy": False}
    assert measured.record("new", "new", "many", about).rows["p"].log_speedup == pytest.approx(0.0)


class Undecided(Loaded):
    """A worker with another token in the last place of an arm, which records how it is asked to check that."""

    def __init__(self, machine: Machine, name: str, served: dict[str, bool]) -> None:
        super().__init__(machine, name)
        self.about = {"about": {"ar": {}, "x": served}}
        self.asked: list[dict[str, Any]] = []

    def ask(self, do: str, **arguments: Any) -> Any:
        if do == "check":
            self.asked.append(arguments)
        return super().ask(do, **arguments)

    def run(self, arm: str, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        run = super().run(arm, prompt, length, expected)
        return run if arm == "ar" else replace(run, tokens=[*run.tokens[:-1], 8])


@pytest.mark.parametrize(
    ("served", "said"), [({}, {}), *[({"served": served}, {"baseline": "ar"}) for served in (False, True)]]
)
def test_a_worker_is_asked_in_words_that_it_knows(served: dict[str, bool], said: dict[str, str]) -> None:
    """Guards against a commit from before server arms that fails on an unknown argument when it checks an output, and
    against a tie with an arm of another backend that is called wrong, because only the reference arm's name shows it.
    """
    machine = Machine(2)
    new = Undecided(machine, "new", served)
    measure_side_by_side(Versions(new, Loaded(machine, "old")), ["ar", "x"], {"p": [1]}, 3, repeats=1)
    assert new.asked == 2 * [{"arm": "x", "prompt": [1], "expected": [7, 7, 7], "got": [7, 7, 8], **said}]


def test_a_version_s_servers_check_its_own_outputs() -> None:
    """Guards against a tie that the other version's servers call wrong, and against a failure while an output is
    checked that ends the session or is blamed on the wrong version.
    """

    class Failing(Undecided):
        def ask(self, do: str, **arguments: Any) -> Any:
            if do == "check":
                raise ArmError("its server answers with 400")
            return super().ask(do, **arguments)

    machine = Machine(2)
    new, old = (Undecided(machine, name, {"served": True}) for name in ("new", "old"))
    measure_side_by_side(Versions(new, old), ["ar", "x"], {"p": [1]}, 3, repeats=1)
    assert (len(new.asked), len(old.asked)) == (2, 2)
    machine = Machine(2)
    both = Versions(Undecided(machine, "new", {"served": True}), Failing(machine, "old", {"served": True}))
    measured = measure_side_by_side(both, ["ar", "x"], {"p": [1], "q": [2]}, 3, repeats=1)
    assert measured.failures == {("old", "x"): "its server answers with 400"}
    assert [set(block) for block in measured.blocks] == [{"ar"}, {"ar"}]


def test_further_repeats_are_of_what_is_open_alone() -> None:
    """Guards against time spent on arms with a clear verdict, the baseline included, and against interim looks that do
    not widen the interval.
    """
    machine, looks = Machine(2), iter([{"x"}, set()])
    both = Versions(Loaded(machine, "new"), Loaded(machine, "old"))
    until = Until(1e9, lambda measured: next(looks))
    measured = measure_side_by_side(both, ["ar", "x"], {"p": [1], "q": [2]}, 5, repeats=1, until=until)
    assert [set(block) for block in measured.blocks] == [{"ar", "x"}, {"ar", "x"}, {"x"}, {"x"}]
    assert [arm for _, arm, _ in machine.log].count("x") == 16
    assert len(measured.quartets("x")) == 4
    about = {"synthetic": False, "against": None, "lossy": False}
    assert {row.counts.runs for row in measured.record("new", "new", "x", about).rows.values()} == {2}
    logs = [quartet.log_ratio for quartet in measured.quartets("x")]
    assert measured.change("x") == typical_ratio(logs, measured.floor("x"), tail_of_look(2))


def test_a_spent_budget_narrows_what_was_measured_to_the_end() -> None:
    """Guards against an interval that still pays for looks that nobody will take, and against a clear verdict that is
    judged again.
    """
    machine, looks = Machine(2), [0]
    both = Versions(Loaded(machine, "new"), Loaded(machine, "old"))

    def look(measured: SideBySide) -> set[str]:
        looks[0] += 1
        return {"x"}

    until = Until(1.5, look, clock=lambda: looks[0], started=0.0)
    measured = measure_side_by_side(both, ["ar", "x"], {"p": [1], "q": [2]}, 5, repeats=1, until=until)
    assert len(measured.quartets("x")) == 4
    for arm, tail in (("x", tail_of_look(2, last=True)), ("ar", tail_of_look(1))):
        logs = [quartet.log_ratio for quartet in measured.quartets(arm)]
        assert measured.change(arm) == typical_ratio(logs, measured.floor(arm), tail)


def test_a_model_that_does_not_fit_even_alone_is_told() -> None:
    """Guards against endless unloading and loading."""
    machine = Machine(1)
    with pytest.raises(ValueError, match="old cannot load its models: even alone"):
        Versions(Loaded(machine, "new"), Loaded(machine, "old", size=2))


def test_a_worker_answers_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an error that ends the worker and the run instead of being reported."""
    folder = str(save(tmp_path / "model"))
    other = str(save(tmp_path / "other", texts=CHARACTERS[::-1]))
    load = {"do": "load", "target": folder, "draft": other, "device": "cpu", "dtype": "float64", "backend": "auto"}
    arms = {"ar": {}, "lookup": {"drafter": "lookup"}, "novel": {"drafter": "oracle"}}
    arms |= {"by-text": {"drafter": "universal"}, "linear": {"drafter": "model"}, "int8": {"quantize": "int8"}}
    arms |= {"clocked": {"drafter": "lookup", "controller": "cost-aware"}, "hf": {"peer": "generate"}}
    run_ = {"do": "run", "arm": "lookup", "prompt": [1, 2, 3], "length": 4, "expected": []}
    requests = [
        {**load, "target": "./nowhere", "arms": arms},
        {**load, "arms": arms},
        run_,
        {**run_, "prompt": []},
        {**run_, "arm": "int8", "length": 40},
        {"do": "expected", "arm": "int8", "prompt": [1, 2, 3], "tokens": [0] * 40},
        {**run_, "length": 40},
        {**run_, "do": "run_in_slices", "steps": 2},
        {"do": "next slice"},
        {"do": "next slice"},
        {"do": "unload"},
    ]
    lines: list[str] = []
    serve((json.dumps(request) for request in requests), lines.append)
    missing, about, done, empty, of_int8, owed, of_target, *rest = map(json.loads, lines)
    *pauses, in_slices, unloaded = rest
    assert "no such folder" in missing["error"]
    assert about["value"]["refused"].keys() == {"novel", "linear"}
    assert len(Run.from_json(done["value"]).tokens) == 4
    assert "prompt is empty" in empty["error"]
    assert [about["value"]["about"][arm]["lossy"] for arm in ("lookup", "int8")] == [False, True]
    assert [about["value"]["about"][arm]["timed"] for arm in ("lookup", "clocked")] == [False, True]
    assert [about["value"]["about"][arm]["peer"] for arm in ("lookup", "hf")] == [False, True]
    assert of_int8["value"]["tokens"] == owed["value"] != of_target["value"]["tokens"]
    assert about["value"]["slices"] is True
    assert pauses == 2 * [{"slice": True}]
    assert in_slices["value"]["run"]["tokens"] == done["value"]["tokens"]
    assert len(in_slices["value"]["slices"]) == 3
    assert min(in_slices["value"]["slices"]) > 0
    assert unloaded == {"value": None}

    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    lines.clear()
    with monkeypatch.context() as patch:
        patch.setattr("specdecode.bench.worker.timed", full)
        serve((json.dumps(request) for request in ({**load, "arms": {"ar": {}}}, {**run_, "arm": "ar"})), lines.append)
    assert json.loads(lines[1]) == {"error": NO_MEMORY, "of_arm": True}
    monkeypatch.setattr("specdecode.bench.arms.models.load", full)
    lines.clear()
    serve([json.dumps({**load, "arms": {"ar": {}}})], lines.append)
    assert json.loads(lines[0])["memory"] is True


def test_a_version_finds_models_and_heads_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `--against` that cannot load a folder which git does not know, and against one head for both
    versions where each has its own."""
    version, here = tmp_path / "version", tmp_path / "here"
    for folder in (version / "heads" / "tracked", here / "heads" / "tracked", here / "llama"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    arms = {"ar": {}, "own": {"head": "heads/tracked"}, "hub": {"head": "org/name"}, "llama": {"head": "./llama"}}
    found = _found_from(version, {"target": "llama", "draft": "", "dtype": None, "arms": arms})
    assert found["arms"] == arms | {"llama": {"head": str(here / "llama")}}
    assert (found["target"], found["draft"]) == (str(here / "llama"), "")


def write_worker(folder: Path, source: str | None) -> None:
    """Write a version of the package that has only a worker, or not even that."""
    (folder / "specdecode" / "bench").mkdir(parents=True)
    if source is not None:
        for package in ("specdecode", "specdecode/bench"):
            (folder / package / "__init__.py").touch()
        (folder / "specdecode" / "bench" / "worker.py").write_text(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; sys.exit('no module of that name')", r"died when asked to load \(exit code 1\).*no module of"),
        ("print('hello', flush=True); input()", "died when asked to load"),
        (None, "v1 cannot be measured side by side: it has no specdecode/bench/worker.py"),
        (
            "import json, os\ninput(); print(json.dumps({'value': {'protocol': 99}}), flush=True); input()",
            "another protocol",
        ),
        (
            f"import json, os\ninput(); print(json.dumps({{'value': {{'protocol': {PROTOCOL}}}}}), flush=True)\n"
            "input(); os.kill(os.getpid(), 9)",
            r"died when asked to run lookup \(exit code -9\)",
        ),
    ],
    ids=["cannot start", "prints", "too old", "protocol", "killed"],
)
def test_a_worker_that_fails_is_told_in_one_sentence(tmp_path: Path, source: str | None, reason: str) -> None:
    """Guards against a run that hangs on a dead worker, or ends in a traceback."""
    write_worker(tmp_path, source)

    def use() -> None:
        worker = WorkerProcess("v1", tmp_path, {"target": "t"})
        with contextlib.closing(worker):
            worker.load()
            worker.run("lookup", [1], 2, [])

    with pytest.raises(ValueError, match=reason) as error:
        use()
    assert "\n" not in str(error.value)


READS_ALL = "import sys; open('asked', 'w').write(sys.stdin.read())"


@pytest.mark.parametrize(
    ("key", "source", "limit_s", "code"),
    [
        ("command", READS_ALL, 60.0, 0),
        ("command", "import time; time.sleep(60)", 0.1, -9),
        ("url", READS_ALL, 60.0, -9),
    ],
    ids=["ends its servers", "hangs", "has started none"],
)
def test_a_worker_ends_its_servers_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, source: str, limit_s: float, code: int
) -> None:
    """Guards against engines that occupy the GPU after a session, and a session that waits for a worker that hangs."""
    write_worker(tmp_path, source)
    monkeypatch.setattr("specdecode.bench.measure.versions._UNLOAD_S", limit_s)
    worker = WorkerProcess("v1", tmp_path, {"arms": {"ar": {"server": {key: "x"}}}})
    worker.close()
    assert worker._process.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("" if code else '{"do": "unload"}\n')


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a repository with this package in one commit."""
    folder = tmp_path_factory.mktemp("repository")
    package_repository(folder)
    return folder


def test_a_slower_working_tree_is_caught_and_blamed(repository: Path, tmp_path: Path) -> None:
    """Guards against two versions that run the same code, and against an arm of only one version that passes in
    silence.

    The working tree waits in every verification for longer than it took. It has an arm that the commit cannot build,
    lacks one that the commit had, and pins another torch.
    """
    model = save(tmp_path / "model", layers=2)
    package = repository / "specdecode"
    slow_down_verification(repository, seconds=0.02)
    edit(package / "bench" / "arms" / "keys.py", '    "none": (),\n', '    "none": (),\n    "novel": (),\n')
    edit(package / "bench" / "arms" / "parts.py", 'if kind == "lookup":', 'if kind in ("lookup", "novel"):')
    quick = package / "bench" / "presets" / "quick.toml"
    # Neither the tree nor any test of it is selected.
    edit(quick, "tree-static = { drafter", "# { drafter")
    edit(quick, "linear-k8 = { drafter", 'novel = { drafter = "novel" }\n#')
    lines = (repository / "constraints.txt").read_text().splitlines()
    pin = next(line for line in lines if line.startswith("torch=="))
    edit(repository / "constraints.txt", pin, "torch==1.0")
    selected = "ar-time or (lookup and not aware and not hf) or novel or k8"
    options = ("-k", selected, f"--target={model}", "--device", "cpu", "--dtype", "float64")
    sizes = ("--draft", "layers:0", "--prompts", "prose:6", "--max-new-tokens", "8", "--against", "HEAD")
    forks = ("-p", "tests.helpers.forked")
    done = run_pytest("--benchmark", *forks, *options, *sizes, "--tolerance", "0.1", cwd=repository)
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    failed = {line.split()[1].split("[")[1] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"ar-time]", "lookup-time]", "linear-k8-time]", "linear-k8-counters]"}, done.stdout
    assert "mostly verifying" in said
    assert "MISSING: linear-k8" in said
    assert "tree-static" not in said
    assert "no drafter is named 'novel'" in said
    assert f"torch {pin.split('==')[1]} -> 1.0" in said
    assert subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True).stdout.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--against", "nowhere"], "--against nowhere: "),
        (["--against", "HEAD", "--resume"], "--resume does not go with --against"),
        (["--against", "HEAD", "--target=./nowhere"], "the working tree cannot load: "),
    ],
)
def test_what_is_wrong_with_a_comparison_is_told_in_one_sentence(
    tmp_path: Path, arguments: list[str], reason: str
) -> None:
    """Guards against a traceback, and a worktree that is left behind."""
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "first")
    forks = ("-p", "tests.helpers.forked")
    done = run_pytest(*ELSEWHERE, *forks, "-k", "lookup", "--device", "cpu", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert reason in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert subprocess.run(["git", "worktree", "list"], cwd=tmp_path, capture_output=True).stdout.count(b"\n") == 1


def test_a_checkout_that_was_cut_short_is_removed(tmp_path: Path) -> None:
    """Guards against an interrupted checkout that git lists for ever: git keeps it locked until it is complete."""
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "first")
    with worktree(tmp_path, "HEAD") as folder:
        git(tmp_path, "worktree", "lock", str(folder))
        assert git(tmp_path, "worktree", "list").count("\n") == 2
    assert git(tmp_path, "worktree", "list").count("\n") == 1


def test_a_cancelled_job_leaves_no_checkout(tmp_path: Path) -> None:
    """Guards against worktrees in the user's repository after CI cancelled the job: it sends SIGTERM."""
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "first")
    waits = "with worktree(Path.cwd(), 'HEAD') as folder:\n    print(folder, flush=True)\n    time.sleep(60)"
    code = f"import time\nfrom pathlib import Path\nfrom specdecode.support.worktree import worktree\n{waits}"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.terminate()
        assert process.wait(30) != 0
    assert not folder.exists()
    assert git(tmp_path, "worktree", "list").count("\n") == 1


def test_other_pins_are_told(repository: Path) -> None:
    """Guards against a speedup that only another torch version caused, and a file of constraints that stops a run."""
    assert dependencies(repository, "nowhere") != []
    git(repository, "checkout", "--quiet", "--", "constraints.txt")
    assert dependencies(repository, "HEAD") == []
    pins = (
        "--extra-index-url https://example.org/simple\n\n# numpy==1, since 1.2 == 2\n"
        "numpy<2; python_version == '3.9'\ntorch==2.0.1  # == the last\n"
        "other==1; python_version >= '3'\nother==2; python_version < '3'\n"
    )
    (repository / "constraints.txt").write_text(pins)
    assert dependencies(repository, "nowhere") == ["other none -> 1", "torch none -> 2.0.1"]
    git(repository, "checkout", "--quiet", "--", "constraints.txt")
