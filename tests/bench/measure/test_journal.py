from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run
from specdecode.bench.measure.experiment import Results, experiment
from specdecode.bench.measure.journal import Journal, source_digest
from specdecode.bench.runs.counts import Counts, Histograms, Seconds
from specdecode.bench.runs.measures import CountersRun
from tests.helpers.damage import NO_SHRINKING, Damage, damaged, taken
from tests.helpers.fuzzing import fuzzed
from tests.helpers.models import lm, prompt
from tests.helpers.root import ROOT

PROMPTS = {"a": list(prompt()), "b": list(prompt(9))}
HEADER, BLOCK = map(json.loads, (ROOT / "tests" / "data" / "blocks.jsonl").read_text().splitlines())
WHAT: dict[str, Any] = {"prompts": PROMPTS, "arms": {"ar": {}, "other": {"k": 3}}, "code": "1234"}


@pytest.fixture(autouse=True)
def _quick_counters_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the counters run by one without the profiler, which takes longer to start than all else here."""

    def counters_run(arm: Arm, *arguments: Any) -> CountersRun:
        arm.run(*arguments)
        return CountersRun()

    monkeypatch.setattr("specdecode.bench.measure.experiment.counters_run", counters_run)


class Interrupted:
    """An experiment with instant arms that is interrupted at the given call."""

    def __init__(self, at: int | None = None) -> None:
        self.calls = 0
        self.at = at
        self.shown: list[tuple[int, int]] = []

    def _run(self, text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        counts, histograms = Counts(steps=length, target_forwards=length), Histograms(accepted=[length])
        return Run([5] * length, 1.0 + 0.01 * self.calls, 0.1, counts, Seconds(draft=0.5), histograms)

    def _other(self, text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
        return self._run(text, length, expected)

    def experiment(self, path: Path, resume: bool = False) -> Results:
        arms = [Arm("ar", self._run, lm("llama")), Arm("other", self._other, lm("llama"))]
        journal = Journal(path, WHAT, resume)
        return experiment(
            arms,
            PROMPTS,
            20,
            repeats=2,
            progress=lambda done, total, doing: self.shown.append((done, total)),
            finished=journal.blocks(),
            failures=journal.failures(),
            keep=lambda results: journal.add_block(results.blocks[-1], results.failures),
        )


@fuzzed(8)
@given(at=st.integers(1, 18), cut=st.integers(0, 30))
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, at: int, cut: int) -> None:
    """Guards against finished blocks that are lost, measured twice, or read from a line that a kill cut off."""
    path = tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Interrupted(at).experiment(path)
    before = path.read_text()
    done = before.count("\n") - 1
    if done and cut:
        path.write_text(before[:-cut])
        done -= 1
    resumed = Interrupted()
    results = resumed.experiment(path, resume=True)
    assert [(block.prompt, block.repeat) for block in results.blocks] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    # One first run and two counters runs, then a warm-up and three runs for each missing block.
    assert resumed.calls == 3 + 4 * (4 - done)
    assert resumed.shown == [(n, resumed.calls) for n in range(resumed.calls + 1)]
    kept = [json.loads(line) for line in before.splitlines()[1 : 1 + done]]
    assert [block.runs["other"].total_s for block in results.blocks[:done]] == [
        entry["runs"]["other"]["total_s"] for entry in kept
    ]
    assert Journal(path, WHAT, resume=True).blocks() == results.blocks
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}


def test_an_arm_that_failed_before_an_interruption_stays_failed(tmp_path: Path) -> None:
    """Guards against a verdict that passes after --resume, on the prompts that came after a failure."""
    path = tmp_path / "run.jsonl"

    class Failing(Interrupted):
        def _other(self, text: Sequence[int], length: int, expected: Sequence[int]) -> Run:
            run = super()._other(text, length, expected)
            if self.at is not None and self.calls > 3:  # not in the counters run
                raise ArmError("it raised")
            return run

    with pytest.raises(KeyboardInterrupt):
        Failing(at=9).experiment(path)
    assert path.read_text().count("\n") == 2
    results = Failing().experiment(path, resume=True)
    assert results.failures == {"other": "it raised"}
    assert [sorted(block.runs) for block in results.blocks] == [["ar"]] * 4


@fuzzed(20, phases=NO_SHRINKING)
@given(file=damaged(BLOCK))
def test_a_damaged_journal_is_refused_or_gone_on_with(tmp_path: Path, file: Damage) -> None:
    """Guards against a resumed run that measures for hours beside a damaged block, and against a traceback instead of
    its line's number.
    """
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"%b\n%b\n" % (json.dumps(HEADER).encode(), file.content))
    lines = (f"line {number} of {path} is damaged" for number in range(2, 6))
    blocks = taken(lambda: Journal(path, HEADER, resume=True).blocks(), f"{path} cannot be read", *lines)
    if not blocks:
        return
    arms = [Arm(name, Interrupted()._run, lm("llama")) for name in blocks[0].runs]
    results = Results(arms, blocks, {})
    assert math.isfinite(results.floor)
    for record in results.records().values():
        for rows in (record.rows, *record.shorter.values()):
            assert all(math.isfinite(row.log_speedup) for row in rows.values())
            json.dumps([asdict(row) for row in rows.values()], allow_nan=False)


def test_blocks_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    """Guards against one run mixed from two versions of the code, or from other prompts."""
    path = tmp_path / "run.jsonl"
    Journal(path, WHAT, resume=False)
    for name, value in {"code": "4321", "prompts": {"a": [1]}}.items():
        with pytest.raises(ValueError, match=f"other {name}: it cannot be resumed"):
            Journal(path, WHAT | {name: value}, resume=True)
    path.write_text("")
    with pytest.raises(ValueError, match="cannot be resumed"):
        Journal(path, WHAT, resume=True)


def test_without_resume_a_run_starts_anew(tmp_path: Path) -> None:
    """Guards against blocks of an earlier run in a new one."""
    path = tmp_path / "run.jsonl"
    Interrupted().experiment(path)
    assert Journal(path, WHAT, resume=False).pieces == []
    assert path.read_text().count("\n") == 1
    assert Journal(tmp_path / "none", WHAT, resume=True).pieces == []


def test_the_code_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that is resumed with edited code."""
    package = tmp_path / "specdecode" / "bench" / "measure"
    package.mkdir(parents=True)
    (package / "journal.py").write_text("a = 1")
    monkeypatch.setattr("specdecode.bench.measure.journal.__file__", str(package / "journal.py"))
    before = source_digest()
    (package / "journal.py").write_text("a = 2")
    assert source_digest() != before


_HOLDER = """
import sys, time
from pathlib import Path
from specdecode.bench.measure.journal import Journal

journal = Journal(Path(sys.argv[1]), {"run": 1}, resume=False)
journal.add({"by": "the other"})
print("holds", flush=True)
sys.stdin.readline()
"""


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    """Guards against two runs at once that mix their blocks, and against one that deletes the other's."""
    path = tmp_path / "run.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        for resume in (False, True):
            with pytest.raises(ValueError, match=rf"jsonl is being written by process {other.pid}, which"):
                Journal(path, {"run": 1}, resume)
        # A killed process cleans nothing up, and still its lock is free.
        other.kill()
    resumed = Journal(path, {"run": 1}, resume=True)
    assert resumed.pieces == [{"by": "the other"}]
    resumed.finish()
    assert not path.exists()
    Journal(path, {"run": 2}, resume=True).finish()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"run": 1}\n{"prompt": "p0"}\n{"promp\n{"prompt": "p2"}\n', 3),
        (b'{"run": 1}\n[1]\n', 2),
        (b'{"run": 1}\n' + b"[" * 100_000 + b"\n", 2),
        (b"garbage\n", 1),
        (b"\0" * 200 + b"\n", 1),
    ],
)
def test_a_damaged_journal_is_told_with_its_line(tmp_path: Path, content: bytes, line: int) -> None:
    """Guards against a traceback that names neither the file nor a way out."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"line {line} of .*run\.jsonl is damaged: delete the line"):
        Journal(path, {"run": 1}, resume=True)
    assert path.read_bytes() == content
    assert Journal(path, {"run": 1}, resume=False).pieces == []


def test_a_line_that_is_no_block_is_told(tmp_path: Path) -> None:
    """Guards against a KeyError for an edited line that is still JSON."""
    path = tmp_path / "run.jsonl"
    Interrupted().experiment(path)
    first, second, *rest = path.read_text().splitlines()
    edited = second.replace('"total_s"', '"total"')
    path.write_text("\n".join([first, edited, *rest]) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        Journal(path, WHAT, resume=True).blocks()


@pytest.mark.parametrize("content", [b"", b'{"run": 1'])
def test_a_journal_without_a_line_is_told_to_be_empty(tmp_path: Path, content: bytes) -> None:
    """Guards against a journal left empty by a crash that is reported as another run's."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.jsonl is empty: it cannot be resumed; leave out --resume"):
        Journal(path, {"run": 1}, resume=True)
    assert path.read_bytes() == content
    assert Journal(path, {"run": 1}, resume=False).pieces == []


def test_a_journal_on_a_full_disk_is_told(tmp_path: Path) -> None:
    """Guards against a traceback after hours of measuring, and against earlier blocks that can no longer be resumed."""
    path = tmp_path / "run.jsonl"
    journal = Journal(path, WHAT, resume=False)
    journal.add({"prompt": "a"})
    journal.path = Path("/dev/full")
    with pytest.raises(ValueError, match="/dev/full cannot be written: No space left on device"):
        journal.add({"prompt": "b"})
    assert Journal(path, WHAT, resume=True).pieces == [{"prompt": "a"}]
