"""`python -m perf.gpu`, on a CPU."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from perf import gpu
from perf.gpu import SuiteStep
from specdecode.bench.presets import preset
from specdecode.bench.runs.file import read
from tests.helpers.root import ROOT
from tests.helpers.suites import run_pytest

BLESSED = next((ROOT / "baselines").glob("*threads/*-quick.json"))


def copied(file: Path) -> str:
    """Return code that writes a run file."""
    return f"import shutil; shutil.copy({str(BLESSED)!r}, {str(file)!r})"


def test_the_rehearsal_tells_all_in_few_files(tmp_path: Path) -> None:
    """Guards against GPU time that is lost because a step cannot even begin, and results that cannot be blessed on
    another machine.
    """
    command = [sys.executable, "-m", "perf.gpu", "--device", "cpu", "--tiny", "--output", str(tmp_path)]
    names = ["environment", "smoke", "tests", "gpu-streaming"]
    # Other tests run at once, and repeats would double the session. They check the shapes of the same code, too, and
    # run these state machines.
    without = [f"--deselect=tests/core/test_slots.py::{name}" for name in ("TestSlots", "TestSlotsWithEviction")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": " ".join(["--specdecode-again=0", *without])}
    variables["JAXTYPING_DISABLE"] = "1"
    done = subprocess.run(
        [*command, "--steps", *names], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpu-streaming" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "report.md", "report.html", "log.txt"}
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert [(step["step"], step["outcome"]) for step in told["steps"]] == [(name, "passed") for name in names]
    assert all(step["seconds"] > 0 for step in told["steps"])
    assert told["environment"]["torch"]
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert "preset gpu-streaming" in text
        assert "streaming-k5-a80-256" in text
    assert "| tests | passed |" in (tmp_path / "report.md").read_text()

    assert gpu.main(["--unpack", str(tmp_path / "gpu.json")]) == 0
    files = sorted((tmp_path / "baselines").glob("*/*.json"))
    assert [read(file).header.identity.preset for file in files] == ["gpu-streaming.tiny"]
    assert all(str(file).endswith(str(read(file).header.identity.file)) for file in files)
    (content,) = (json.loads(file.read_text()) for file in files)
    arms = preset("gpu-streaming").arms.keys()
    assert content["specdecode"]["arms"].keys() == {test["param"] for test in content["benchmarks"]} == arms


@pytest.mark.skipif(
    not os.environ.get("SPECDECODE_BARE"), reason="needs an environment with few packages; tox -e bare makes one"
)
def test_a_session_needs_few_packages(tmp_path: Path) -> None:
    """Guards against a run that is lost because an image for GPUs lacks a package, and against a file that
    pytest-benchmark 5.2, which opens it before the session, leaves empty.
    """
    assert [name for name in gpu.OPTIONAL if find_spec(name)] == ["hypothesis"]
    with pytest.raises(PackageNotFoundError):
        version("specdecode")
    assert version("pytest-benchmark").startswith("5.2.")
    file = tmp_path / "run.json"
    arm = ("--benchmark", "--tiny", "--device=cpu", "-k", "lookup and not hf and not aware")
    done = run_pytest(*arm, "--prompts=prose@40:3", "--max-new-tokens=4", f"--benchmark-json={file}", alone=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [file]
    assert [test["param"] for test in json.loads(file.read_text())["benchmarks"]] == ["lookup"]
    assert [len(arm.rows) for arm in read(file).arms.values()] == [3, 3]


def test_a_step_that_fails_loses_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a crashed or hanging step that loses the results of other steps, and against a process that keeps
    running on the GPU behind later measurements.
    """
    lock = tmp_path / "lock"
    hang = (
        f"import fcntl, signal, subprocess, time; held = open({str(lock)!r}, 'w'); fcntl.flock(held, fcntl.LOCK_EX)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN); print('asleep')\n"
        "subprocess.Popen(['sleep', '100'], pass_fds=[held.fileno()]); time.sleep(100)"
    )

    crash = "print('[gw0] [ 1%] FAILED tests/test_a.py::test_b'); exit('!!! Exit: no such thing !!!')"

    def planted(device: str, tiny: bool, runs: Path, asked: list[str]) -> list[SuiteStep]:
        def measured(name: str) -> SuiteStep:
            code = f"import os; assert os.environ['STEP'] == {name!r}; {copied(runs / f'{name}.json')}"
            return SuiteStep(name, ["-c", code], 2.0, variables={"STEP": name})

        return [
            measured("before"),
            SuiteStep("crash", ["-c", crash], 1.0),
            SuiteStep("hang", ["-c", hang], 1.0),
            SuiteStep("elsewhere", ["-c", "exit(1)"], 1.0, skip="this machine has no such thing"),
            measured("after"),
        ]

    monkeypatch.setattr(gpu, "steps", planted)
    monkeypatch.setattr(gpu, "_GRACE_S", 1.0)
    monkeypatch.setattr(gpu, "_PAGES_S", 1.0)
    arguments = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert gpu.main([*arguments, "--budget-minutes", "0.2"]) == 1
    told = json.loads((tmp_path / "out" / "gpu.json").read_text())
    outcomes = {step["step"]: step for step in told["steps"]}
    assert [outcome["outcome"] for outcome in outcomes.values()] == ["passed", "failed", "failed", "skipped", "passed"]
    assert outcomes["crash"]["reason"] == "exit code 1; Exit: no such thing"
    assert outcomes["crash"]["failures"] == ["[gw0] [ 1%] FAILED tests/test_a.py::test_b"]
    assert outcomes["hang"]["reason"].startswith("stopped after")
    assert outcomes["elsewhere"]["reason"] == "this machine has no such thing"
    assert list(told["runs"].values()) == [json.loads(BLESSED.read_text())]
    assert "| hang | failed |" in (tmp_path / "out" / "report.md").read_text()
    assert "preset quick" in (tmp_path / "out" / "report.html").read_text()
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(gpu, "steps", lambda *given: planted(*given)[3:])
    assert gpu.main(arguments) == 0
    assert "1/2 elsewhere" in capsys.readouterr().out


def test_an_interrupted_step_leaves_the_blocks_that_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against finished measurements that an interrupt loses, and later steps that still start."""
    interrupt = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(100)"

    def planted(device: str, tiny: bool, runs: Path, asked: list[str]) -> list[SuiteStep]:
        file = runs / "interrupted.unfinished.json"
        return [
            SuiteStep("interrupted", ["-c", f"{copied(file)}; {interrupt}"], 2.0),
            SuiteStep("after", ["-c", "pass"], 2.0),
        ]

    monkeypatch.setattr(gpu, "steps", planted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert gpu.main(["--device", "cpu", "--output", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    told = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(step["step"], step["outcome"]) for step in told["steps"]] == [("interrupted", "interrupted")]
    assert list(told["runs"].values()) == [json.loads(BLESSED.read_text())]
    assert "preset quick" in (tmp_path / "out" / "report.html").read_text()
    assert "gpu.json holds what was measured" in capsys.readouterr().err


def test_what_cannot_be_begun_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against eight failing steps because a GPU or a folder is missing, and a misspelt step that is silently
    left out.
    """
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, reason in (
        ([], "finds no GPU here"),
        (["--device", "cpu", "--steps", "gpo"], "named 'gpo': choose"),
        (["--device", "cpu", "--output", str(tmp_path / "file")], "cannot be written: "),
    ):
        with pytest.raises(SystemExit) as exit_:
            gpu.main(arguments)
        assert exit_.value.code == 2
        assert reason in capsys.readouterr().err
    for content, reason in ((None, "cannot be read"), ("{", "cannot be read"), ("{}", "runs is None")):
        file = tmp_path / "gpu.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(SystemExit) as exit_:
            gpu.main(["--unpack", str(file)])
        assert exit_.value.code == 2
        assert reason in capsys.readouterr().err


def test_a_machine_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a step that fails because a package is missing, and against packages that are downloaded on a
    measuring machine.
    """
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setenv("SPECDECODE_CACHE", str(tmp_path))
    steps = {step.name: step for step in gpu.steps("cuda", False, tmp_path)}
    skipped = {name: step.skip for name, step in steps.items() if step.skip}
    assert skipped == {
        "tests": "hypothesis is not installed",
        "quick": "smollm2-135m is not fetched yet: specdecode fetch",
        "gpu-triton": "needs a GPU and the package triton",
        "roofline-triton": "needs a GPU and the package triton",
    }
    assert "--prompts=prose:6" in steps["quick"].arguments
    assert "--backend=auto" in steps["gpu"].arguments
    assert "-n" not in steps["tests"].arguments
    assert steps["gpu-cudnn"].variables == {"SPECDECODE_CUDNN_ATTENTION": "1"}
    assert {step.skip for step in gpu.steps("cpu", True, tmp_path, ["gpu-compile"])} == {""}
    # Compiling would take most of the two minutes of a rehearsal.
    for asked, selection in (([], ["-k", "not compiled"]), (["gpu"], [])):
        [step] = [step for step in gpu.steps("cpu", True, tmp_path, asked) if step.name == "gpu"]
        assert [argument for argument in step.arguments if argument in ("-k", "not compiled")] == selection
