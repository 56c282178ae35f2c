"""Baselines with a history in git: the tolerance of an arm, and slowdowns that are too small for the gate each time."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specdecode.bench.gate.baselines import bless
from specdecode.bench.gate.history import history
from specdecode.bench.gate.series import LEAST_EARLIER_VERSIONS, past_noise, series
from specdecode.bench.gate.verdicts import Judgement, Verdict, judge_by_baseline, noise_in_history
from specdecode.bench.measure import speed_session
from specdecode.bench.runs.file import read
from tests.helpers.command_line import exit_code
from tests.helpers.run_contents import IDENTITY, SPEEDUPS, run_content

FILE = Path("baselines") / IDENTITY.file


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=n@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_and_bless(speedups: Mapping[str, float], reason: str, **content: Any) -> str:
    """Commit a code change, bless a run of it, and commit the baseline. Return the commit of the code."""
    Path("code.txt").write_text(reason)
    git("add", ".")
    git("commit", "--quiet", "--message", reason)
    commit = git("rev-parse", "HEAD")
    run = run_content(SPEEDUPS | speedups, **content)
    run["commit_info"]["id"] = commit
    Path("run.json").write_text(json.dumps(run))
    bless([Path("run.json")], Path("baselines"), reason)
    git("add", "baselines")
    git("commit", "--quiet", "--message", f"bless: {reason}")
    return commit[:10]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    Path(".gitignore").write_text("run*.json\n")
    return tmp_path


def bless_all(speeds: Sequence[float]) -> list[str]:
    """Bless a version for each speed of the arm "linear". The other arms only have noise."""
    chance = np.random.default_rng(5)
    others = [arm for arm in SPEEDUPS if arm not in ("ar", "linear", "hf-generate")]
    return [
        commit_and_bless(
            {"linear": speed} | {arm: SPEEDUPS[arm] * np.exp(chance.normal(0, 0.002)) for arm in others},
            reason=f"version {number}",
        )
        for number, speed in enumerate(speeds)
    ]


def test_eight_slowdowns_that_each_pass_are_found_together(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against speed that is lost in small steps, each within the gate's tolerance."""
    chance = np.random.default_rng(22)
    planted = [0] * 6 + [*range(1, 9)] + [8] * 2
    commits = bless_all([2.0 * 0.99**losses * np.exp(chance.normal(0, 0.003)) for losses in planted])
    runs = history(FILE).runs
    for new, old in zip(runs[1:], runs, strict=False):
        verdicts = [judged.verdict for judged in judge_by_baseline(new, old)]
        assert set(verdicts) <= {Verdict.PASS, Verdict.NOT_JUDGED}
    assert exit_code(monkeypatch, "history") == 1
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    loss = re.search(r"linear slower -(.*?)% \[-(.*?)%, -(.*?)%\]", said)
    assert loss, said
    value, most, least = map(float, loss.groups())
    assert value == pytest.approx(100 * (1 - 0.99**8), abs=0.5)
    assert value - 1 < least < value < most < value + 1
    assert f"{commits[6]} of 2026-01-02 (version 6), in 8 versions until {commits[13]}" in said
    assert "No change found: ar, lookup." in said
    assert "p: probability that chance alone makes such a change" in said
    assert "by: change of the speedup, and its 95 % interval" in said
    assert "reason: why the run was blessed" in said
    assert exit_code(monkeypatch, "history", FILE, "--arm", "lookup") == 0
    said = capsys.readouterr().out
    assert "linear" not in said
    assert f"{commits[3]} " in said
    ends = [exit_code(monkeypatch, "history", "--since", commit) for commit in (commits[12], commits[13], "nothing")]
    assert ends == [1, 0, 2]
    assert "nothing: no such commit" in capsys.readouterr().err


def test_a_step_is_named_by_its_commit_and_a_gain_is_no_failure(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a change that is found without its commit, and against an alarm where an arm became faster."""
    chance = np.random.default_rng(1)
    commits = bless_all([speed * np.exp(chance.normal(0, 0.003)) for speed in [2.0] * 7 + [2.2] * 7])
    assert exit_code(monkeypatch, "history") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    gain = re.search(r"linear faster \+(.*?)% \[", said)
    assert gain, said
    assert float(gain[1]) == pytest.approx(10, abs=0.5)
    assert f"{commits[7]} of 2026-01-02 (version 7)" in said
    assert "versions until" not in said


NOISY = [2.0, 2.05, 1.97, 2.03, 1.95, 2.04, 1.99, 2.06, 1.96, 2.02, 1.98, 2.05]


def judged_everywhere(new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the verdicts on a run's times by `specdecode gate`, `specdecode report` and a session of pytest."""
    exit_code(monkeypatch, "gate", new, FILE)
    gate = capsys.readouterr().out
    exit_code(monkeypatch, "report", new)
    report = capsys.readouterr().out
    preset = SimpleNamespace(arms=SPEEDUPS)
    plan = SimpleNamespace(baseline=read(FILE), preset=preset, tolerance=0.05, tolerances={})
    judgements = speed_session._judge(plan, read(new), noise_in_history(read(FILE)))  # type: ignore[arg-type]
    session = " ".join(f"{judged.verdict.value} {judged.arm}: {judged.reason}" for judged in judgements)
    return [" ".join(text.replace("│", " ").split()) for text in (gate, report, session)]


def test_what_an_arm_may_lose_is_no_less_than_its_own_noise(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a gate that an unsteady arm fails by chance, and against three commands that judge it
    differently.
    """
    new = Path("run-new.json")
    new.write_text(json.dumps(run_content(SPEEDUPS | {"linear": NOISY[-1] * 0.92, "lookup": 1.3 * 0.92})))
    bless_all(NOISY[:LEAST_EARLIER_VERSIONS])
    for said in judged_everywhere(new, monkeypatch, capsys):
        assert "own history" not in said
    bless_all(NOISY[LEAST_EARLIER_VERSIONS:])
    changes = np.abs(np.diff(np.log(NOISY)))
    lower, upper = np.quantile(changes, [0.25, 0.75])
    tolerance = 1 - np.exp(-(upper + 3 * (upper - lower)))
    assert tolerance > 0.07
    for said in judged_everywhere(new, monkeypatch, capsys):
        assert said.count(f"tolerance {tolerance:.1%}, from its own history") == 1
        assert said.count("REGRESSED") == 1  # lookup lost as much, and its versions agree


def test_the_tolerance_that_is_given_holds_where_it_is_wider(repository: Path) -> None:
    """Guards against a history that narrows the configured tolerance, or widens the tolerance of counters."""
    bless_all(NOISY)
    fewer_steps = run_content(SPEEDUPS | {"linear": 1.6})
    for arm in fewer_steps["specdecode"]["arms"].values():
        for row in arm["rows"].values():
            row["counts"]["target_forwards"] *= 1.05
    Path("run.json").write_text(json.dumps(fewer_steps))
    judgements = judge_by_baseline(read(Path("run.json")), read(FILE), tolerance=0.3)
    assert not [judged for judged in judgements if "own history" in judged.reason]
    by_gate: dict[tuple[str, str], Judgement] = {(judged.arm, judged.gate): judged for judged in judgements}
    assert by_gate["linear", "time"].verdict is Verdict.PASS
    assert by_gate["linear", "counters"].verdict is Verdict.REGRESSED


def test_only_versions_that_can_be_compared_count(repository: Path) -> None:
    """Guards against a tolerance widened by versions with other lengths, backends or turns, or a wrong token."""
    bless_all(NOISY[:3])
    others = [run_content(SPEEDUPS | {"linear": 9.0}) for _ in range(5)]
    others[0]["specdecode"]["max_new_tokens"] = 80
    others[1]["specdecode"]["versions"]["backend"] = "packed"
    others[2]["specdecode"]["arms"]["linear"]["bugs"] = 1
    others[3]["specdecode"]["arms"]["linear"]["rows"].popitem()
    others[4]["specdecode"]["versions"]["turns"] = "steps"
    for content in others:
        FILE.write_text(json.dumps(content))
        git("commit", "--quiet", "--all", "--message", "other")
    bless_all(NOISY[3:])
    runs = history(FILE).runs
    assert len(runs) == len(NOISY) + 5
    assert series("linear", runs).versions == [0, 1, 2, *range(8, len(runs))]
    assert np.exp(series("linear", runs).logs) == pytest.approx(np.array(NOISY) * np.exp(0.02))
    assert 0 < past_noise("linear", runs) < 0.2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "baselines has no baselines"),
        (["nowhere.json"], "nowhere.json"),
        (["run.json", "-k", "nothing"], "has no arm 'nothing' of ours: choose from ar, linear, lookup"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(
    repository: Path,
    arguments: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against a traceback, and against an exit code that means a slowdown."""
    Path("run.json").write_text(json.dumps(run_content(SPEEDUPS)))
    assert exit_code(monkeypatch, "history", *arguments) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_one_baseline_does_not_hide_another(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a damaged baseline, or one without the asked arm, that keeps the others from being shown."""
    for hardware, speedups in (("first", SPEEDUPS), ("second", SPEEDUPS | {"other": 2.0})):
        file = Path("baselines", hardware, "run.json")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(run_content(speedups, hardware=hardware)))
    assert exit_code(monkeypatch, "history", "-k", "other") == 0
    shown = capsys.readouterr().out
    assert str(Path("baselines", "second", "run.json")) in shown
    assert str(Path("baselines", "first", "run.json")) not in shown
    Path("baselines", "first", "run.json").write_text("{")
    assert exit_code(monkeypatch, "history") == 2
    told = capsys.readouterr()
    assert "cannot be read" in told.err
    assert str(Path("baselines", "second", "run.json")) in told.out


def test_a_file_without_a_past_is_shown(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a baseline that is not committed yet reported as a wrong input."""
    Path("run.json").write_text(json.dumps(run_content(SPEEDUPS)))
    assert exit_code(monkeypatch, "history", "run.json") == 0
    said = capsys.readouterr().out
    assert "No history of run.json: fatal: your current branch" in said
    assert "Too few versions like the newest to find a change (6 at least): ar (1), linear (1), lookup (1)." in said
