from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from specdecode.bench.gate.baselines import bless, ever_sees, find
from specdecode.bench.gate.verdicts import FAILING, Judgement, Verdict, judge, judges_times, open_arms
from specdecode.bench.runs.counts import Histograms, RowCounts, RowSeconds
from specdecode.bench.runs.file import read, run_json
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import ANY_HARDWARE
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile
from tests.helpers.command_line import exit_code

PROMPTS = [f"text/{i}" for i in range(8)]
COUNTS = {
    "runs": 1,
    "tokens": 40,
    "steps": 20,
    "target_forwards": 20,
    "drafted": 40,
    "accepted": 20,
    "cache_bytes": 1e3,
}


def content(
    speedups: dict[str, float],
    floor: float = 0.01,
    scatter: float = 0.0,
    host_syncs: float = 3.0,
    lengths: tuple[int, ...] = (8, 4, 8),
    **counts: float,
) -> dict[str, Any]:
    """Return a run file in which every arm has one speedup on all prompts, with a scatter. It has `ar` and a
    peer too.
    """
    speedups = {"ar": 1.0, "hf-generate": 0.9} | speedups
    identity = Identity("abacus-2-threads", "t", "d", "float32", "quick")
    outputs = {prompt: prompt[::-1] for prompt in PROMPTS}
    header = Header(identity, 40, outputs, floor, roofline=100.0, versions={"torch": "2"})
    arms = {}
    for arm, speedup in speedups.items():
        rows = {}
        for i, prompt in enumerate(PROMPTS):
            log = math.log(speedup) + (scatter * (-1) ** i if arm not in ("ar", "hf-generate") else 0.0)
            seconds = {"total": math.exp(-log), "ttft": 0.1 * math.exp(-log)}
            histograms = Histograms(accepted=list(lengths), depth=[0, 0, 20])
            rows[prompt] = Row(log, RowCounts(**COUNTS | counts), RowSeconds(**seconds), histograms)
        arms[arm] = ArmRecord(rows, counters_run=CountersRun(host_syncs_per_step=host_syncs))
    run = RunFile(Path(), header, arms)
    return {
        "commit_info": {"dirty": False},
        "specdecode": run_json(run),
        "benchmarks": [],
    }


@pytest.fixture
def judged(tmp_path: Path) -> Any:
    def judged(new: dict[str, Any], old: dict[str, Any], **options: Any) -> dict[tuple[str, str], Judgement]:
        for name, run in (("new", new), ("old", old)):
            (tmp_path / name).write_text(json.dumps(run))
        judgements = judge(read(tmp_path / "new"), read(tmp_path / "old"), **options)
        return {(judgement.arm, judgement.gate): judgement for judgement in judgements}

    return judged


@pytest.mark.parametrize(
    ("speedup", "scatter", "verdict"),
    [
        (2.0, 0.0, Verdict.PASS),
        (1.96, 0.0, Verdict.PASS),
        (1.8, 0.0, Verdict.REGRESSED),
        (2.2, 0.0, Verdict.IMPROVED),
        (1.93, 0.1, Verdict.INCONCLUSIVE),
        (1.8, 0.3, Verdict.INCONCLUSIVE),
        (1.5, 0.1, Verdict.REGRESSED),
    ],
)
def test_a_time_is_judged_by_its_whole_interval(judged: Any, speedup: float, scatter: float, verdict: Verdict) -> None:
    """Guards against a gate that flaps: worse on average is no regression while better is equally possible."""
    new = content({"linear": speedup}, scatter=scatter)
    assert judged(new, content({"linear": 2.0}))["linear", "time"].verdict is verdict


def test_noise_of_either_run_widens_the_interval(judged: Any) -> None:
    """Guards against machine noise reported as a regression because the prompts agree by chance."""
    slower, before = {"linear": 1.85}, {"linear": 2.0}
    assert judged(content(slower), content(before))["linear", "time"].verdict is Verdict.REGRESSED
    noisy = judged(content(slower, floor=0.1), content(before))
    assert noisy["linear", "time"].verdict is Verdict.INCONCLUSIVE
    noisy = judged(content(slower), content(before, floor=0.1))
    assert noisy["linear", "time"].verdict is Verdict.INCONCLUSIVE


def test_the_tolerance_is_the_users(judged: Any) -> None:
    """Guards against a tolerance that is accepted and has no effect."""
    new, old = content({"linear": 1.8}), content({"linear": 2.0})
    assert judged(new, old, tolerance=0.2)["linear", "time"].verdict is Verdict.PASS
    assert "tolerance 1.5%" in judged(new, old, tolerance=0.015)["linear", "time"].reason


def test_a_server_that_drafts_nothing_is_judged(judged: Any) -> None:
    """Guards against a division by zero that loses a measured run."""
    never = content({"linear": 2.0}, lengths=(0, 0, 0))
    assert judged(never, never)["linear", "time"].verdict is Verdict.PASS


def test_an_arm_that_is_gone_or_renamed_is_missing(judged: Any) -> None:
    """Guards against a removed arm that passes in silence, as in pytest-benchmark."""
    verdicts = judged(content({"linear-5": 2.0}), content({"linear": 2.0}))
    assert {verdicts["linear", gate].verdict for gate in ("time", "counters")} == {Verdict.MISSING}
    assert {verdicts["linear-5", gate].verdict for gate in ("time", "counters")} == {Verdict.NO_BASELINE}
    assert verdicts["ar", "time"].verdict is Verdict.PASS


def test_times_of_another_machine_are_not_judged_but_counters_are(judged: Any) -> None:
    """Guards against a faster machine that hides a regression, and a slower one that invents it."""
    new, old = content({"linear": 1.0}, target_forwards=24), content({"linear": 2.0})
    new["specdecode"]["identity"]["hardware"] = "calculator"
    verdicts = judged(new, old)
    assert verdicts["linear", "time"].verdict is Verdict.WRONG_HARDWARE
    assert "abacus-2-threads" in verdicts["linear", "time"].reason
    assert verdicts["linear", "counters"].verdict is Verdict.REGRESSED
    new["specdecode"]["arms"]["hf-generate"]["peer"] = True
    verdicts = judged(new, old)
    assert not judges_times(verdicts.values())  # such a run may become a baseline, and `--until` sees to its noise
    assert judges_times(judged(content({"linear": 1.0}), old).values())
    old["specdecode"]["identity"]["hardware"] = ANY_HARDWARE
    assert not judges_times(judged(new, old).values())


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({"target_forwards": 20.2}, Verdict.PASS, "counters"),
        ({"target_forwards": 22}, Verdict.REGRESSED, "target_forwards_per_token 0.5 -> 0.55"),
        ({"target_forwards": 16}, Verdict.IMPROVED, "target_forwards_per_token"),
        ({"steps": 21}, Verdict.REGRESSED, "mean_acceptance_length 2 -> 1.905"),
        ({"accepted": 25}, Verdict.IMPROVED, "acceptance_rate"),
        ({"cache_bytes": 1.1e3}, Verdict.REGRESSED, "cache_bytes"),
        ({"host_syncs": 4.0}, Verdict.REGRESSED, "host_syncs_per_step 3 -> 4"),
        ({"lengths": (8, 6, 6)}, Verdict.REGRESSED, "steps that accept at least 2: 40% -> 30%"),
        ({"lengths": (8, 4, 4, 4)}, Verdict.IMPROVED, "at least 3: 0% -> 20%"),
        ({"lengths": (6, 6, 8)}, Verdict.IMPROVED, "at least 1: 60% -> 70%"),
    ],
)
def test_counters_are_judged_tightly_and_the_right_way_round(
    judged: Any, change: dict[str, Any], verdict: Verdict, reason: str
) -> None:
    """Guards against higher acceptance reported as a regression, and more forwards reported as an improvement."""
    judgement = judged(content({"linear": 2.0}, **change), content({"linear": 2.0}))["linear", "counters"]
    assert judgement.verdict is verdict
    assert reason in judgement.reason


def test_one_counter_that_is_better_does_not_excuse_another(judged: Any) -> None:
    """Guards against a worse counter that passes because another one is better."""
    new = content({"linear": 2.0}, steps=10, cache_bytes=2000.0)
    judgement = judged(new, content({"linear": 2.0}))["linear", "counters"]
    assert judgement.verdict is Verdict.REGRESSED
    worse, better = judgement.reason.split("; better: ")
    assert "cache_bytes" in worse
    assert "mean_acceptance_length" in better


def test_a_counter_that_is_no_longer_counted_is_missing(judged: Any) -> None:
    """Guards against a regressed counter that passes because it is no longer counted."""
    new = content({"linear": 2.0})
    del new["specdecode"]["arms"]["linear"]["rehearsal"]["host_syncs_per_step"]
    assert judged(new, content({"linear": 2.0}))["linear", "counters"].verdict is Verdict.MISSING
    for row in new["specdecode"]["arms"]["linear"]["rows"].values():
        del row["counts"]["cache_bytes"]
    judgement = judged(new, content({"linear": 2.0}))["linear", "counters"]
    assert judgement.verdict is Verdict.MISSING
    assert "cache_bytes, host_syncs_per_step" in judgement.reason


def test_a_wrong_output_is_worse_than_any_time(judged: Any) -> None:
    """Guards against `specdecode gate` passing a run with a wrong output that the suite failed."""
    new = content({"linear": 4.0})
    new["specdecode"]["arms"]["linear"]["bugs"] = 1.0
    verdicts = judged(new, content({"linear": 2.0}))
    assert {verdicts["linear", gate].verdict for gate in ("time", "counters")} == {Verdict.REGRESSED}
    assert "1 wrong output" in verdicts["linear", "time"].reason


def test_counters_that_follow_the_clock_are_not_judged(judged: Any) -> None:
    """Guards against a gate that fails at random on counters that depend on the clock, and against one that omits them
    without a note. An older file does not mark such arms.
    """
    old, new = content({"linear": 2.0}), content({"linear": 2.0}, target_forwards=30)
    assert judged(new, old)["linear", "counters"].verdict is Verdict.REGRESSED
    new["specdecode"]["arms"]["linear"]["timed"] = True
    del old["specdecode"]["arms"]["linear"]["timed"]
    for pair in ((new, old), (old, new)):
        found = judged(*pair)["linear", "counters"]
        assert found.verdict is Verdict.NOT_JUDGED
        assert "the clock decides" in found.reason
    slower = content({"linear": 1.0})
    slower["specdecode"]["arms"]["linear"]["timed"] = True
    assert judged(slower, old)["linear", "time"].verdict is Verdict.REGRESSED
    assert judged(new, old)["ar", "counters"].verdict is Verdict.REGRESSED


def test_counters_are_compared_where_the_outputs_are_the_same(judged: Any) -> None:
    """Guards against a false regression on a machine that resolves ties differently, and so decodes other texts."""
    new = content({"linear": 2.0}, target_forwards=24)
    assert judged(new, content({"linear": 2.0}))["linear", "counters"].verdict is Verdict.REGRESSED
    for prompt in PROMPTS[1:]:
        new["specdecode"]["outputs"][prompt] = "other"
    rows = new["specdecode"]["arms"]["linear"]["rows"]
    rows[PROMPTS[0]]["counts"]["target_forwards"] = 20
    judgement = judged(new, content({"linear": 2.0}))["linear", "counters"]
    assert judgement.verdict is Verdict.PASS
    assert "1 prompt" in judgement.reason


def test_other_prompts_are_not_compared(judged: Any) -> None:
    """Guards against easier texts reported as a speedup."""
    new = content({"linear": 4.0})
    new["specdecode"]["max_new_tokens"] = 400
    new["specdecode"]["outputs"] = dict.fromkeys(PROMPTS, "longer")
    verdicts = judged(new, content({"linear": 2.0}))
    assert {judgement.verdict for judgement in verdicts.values()} == {Verdict.INCONCLUSIVE}
    new, old = content({"linear": 2.0}), content({"linear": 2.0})
    new["specdecode"]["prompts"] = dict.fromkeys(PROMPTS, "text")
    assert judged(new, old)["linear", "time"].verdict is Verdict.PASS  # an older file
    old["specdecode"]["prompts"] = dict.fromkeys(PROMPTS[:6], "text") | dict.fromkeys(PROMPTS[6:], "another")
    for prompt in PROMPTS[6:]:
        new["specdecode"]["arms"]["linear"]["rows"][prompt]["log_speedup"] = 5.0
    assert judged(new, old)["linear", "time"].verdict is Verdict.PASS
    old["specdecode"]["prompts"] = dict.fromkeys(PROMPTS, "another")
    judgement = judged(new, old)["linear", "time"]
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "8 prompt(s) of the same name have another text" in judgement.reason


def test_other_weights_of_the_same_name_are_not_compared(judged: Any) -> None:
    """Guards against a false regression when the embedded model's weights come from another source."""
    new = content({"linear": 1.0}, target_forwards=36)
    new["specdecode"]["versions"]["weights"] = "elsewhere"
    verdicts = judged(new, content({"linear": 2.0}))
    assert {judgement.verdict for judgement in verdicts.values()} == {Verdict.INCONCLUSIVE}


@pytest.mark.parametrize("model", ["target", "draft"])
def test_models_whose_files_share_a_name_are_not_compared(judged: Any, model: str) -> None:
    """Guards against one draft judged by another's run, because file names have fewer characters than paths."""
    new, old = content({"linear": 1.0}), content({"linear": 2.0})
    for name, other, verdict in (
        ("./m", "../m", Verdict.INCONCLUSIVE),
        ("./m", "m/", Verdict.REGRESSED),
        ("m", "another", Verdict.REGRESSED),  # files that the user compares
    ):
        for run, path in ((new, name), (old, other)):
            run["specdecode"]["identity"][model] = path
        assert judged(new, old)["linear", "time"].verdict is verdict, (name, other)


def test_another_backend_is_compared_by_what_does_not_depend_on_it(judged: Any) -> None:
    """Guards against a false regression on a machine where another backend is the fastest, and against counters that
    are not judged there.
    """
    new, old = content({"linear": 1.0}), content({"linear": 2.0})
    new["specdecode"]["versions"]["backend"] = "packed"
    for run, size in ((new, 2.0), (old, 1.0)):
        run["specdecode"]["arms"]["linear"]["rehearsal"] = {"weight_bytes": size}
        for row in run["specdecode"]["arms"]["linear"]["rows"].values():
            row["counts"]["attended_bytes"] = size
    verdicts = judged(new, old)
    assert verdicts["linear", "time"].verdict is Verdict.INCONCLUSIVE
    assert "backend eager and this run on packed" in verdicts["linear", "time"].reason
    assert verdicts["linear", "counters"].verdict is Verdict.PASS
    new["specdecode"]["versions"]["backend"] = "eager"
    regressed = judged(new, old)["linear", "counters"]
    assert regressed.verdict is Verdict.REGRESSED
    assert "weight_bytes" in regressed.reason
    assert "attended_bytes_per_step" in regressed.reason
    assert judged(new, old)["linear", "time"].verdict is Verdict.REGRESSED


def test_times_in_turns_are_judged_by_times_in_turns_alone(judged: Any) -> None:
    """Guards against a false regression where one run compared whole runs and the other one took turns step by step,
    against `--until` that leaves such a run too noisy to become a baseline, and against counters that are not judged.
    """
    new, old = content({"linear": 1.0}), content({"linear": 2.0})
    new["specdecode"]["versions"]["turns"] = "steps"
    for run, other, turns in ((new, old, "whole runs"), (old, new, "runs in turns with the reference arm")):
        verdicts = judged(run, other)
        assert verdicts["linear", "time"].verdict is Verdict.INCONCLUSIVE
        assert f"the baseline has {turns}" in verdicts["linear", "time"].reason
        assert verdicts["linear", "counters"].verdict is Verdict.PASS
        assert not judges_times(verdicts.values())
        assert not open_arms(verdicts.values(), 0.05)
    old["specdecode"]["versions"]["turns"] = "steps"
    new["specdecode"]["arms"]["hf-generate"]["peer"] = True
    assert judged(new, old)["linear", "time"].verdict is Verdict.REGRESSED
    assert judges_times(judged(new, old).values())


def test_times_of_wrong_outputs_judge_nothing(judged: Any) -> None:
    """Guards against a repaired arm that is called slower than its wrong output was."""
    new, old = content({"linear": 1.0}), content({"linear": 2.0})
    old["specdecode"]["arms"]["linear"]["bugs"] = 3
    for gate in ("time", "counters"):
        judgement = judged(new, old)["linear", gate]
        assert judgement.verdict is Verdict.NO_BASELINE
        assert "3 wrong output(s)" in judgement.reason


def test_arms_that_were_not_selected_are_not_missing(judged: Any) -> None:
    """Guards against `specdecode gate` that fails a run of `-k linear`, which its own session passed."""
    new, old = content({"linear": 2.0}), content({"linear": 2.0, "tree": 2.0, "retired": 2.0})
    new["specdecode"]["unselected"] = ["tree"]
    missing = {arm for (arm, _), judgement in judged(new, old).items() if judgement.verdict is Verdict.MISSING}
    assert missing == {"retired"}
    assert ("tree", "time") not in judged(new, old)


def test_why_counters_cannot_be_compared(judged: Any) -> None:
    """Guards against advice to measure the same prompts where the code writes other tokens."""
    old = content({"linear": 2.0})
    tokens, length = copy.deepcopy(old), copy.deepcopy(old)
    tokens["specdecode"]["outputs"] = dict.fromkeys(PROMPTS, "other")
    prompts = json.loads(json.dumps(old).replace('"text/', '"other/'))
    length["specdecode"]["max_new_tokens"] = 50
    length["specdecode"]["outputs"] = dict.fromkeys(PROMPTS, "other")
    for new, reason in (
        (tokens, "ar writes other tokens"),
        (prompts, "measure the same prompts"),
        (length, "measure the same length"),
    ):
        judgement = judged(new, old)["linear", "counters"]
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert reason in judgement.reason


def test_the_settings_of_the_gate() -> None:
    """Guards against a verdict that fails under no setting, and one that fails under every setting."""
    assert FAILING["on"] == {Verdict.REGRESSED, Verdict.MISSING}
    assert FAILING["strict"] == set(Verdict) - {Verdict.PASS, Verdict.IMPROVED, Verdict.NOT_JUDGED}
    assert FAILING["off"] == set()


def _hostile(change: str) -> str:
    run = content({"linear": 2.0})
    extra = run["specdecode"]["arms"]["linear"]
    if change == "cut":
        return json.dumps(run)[:200]
    if change == "foreign":
        return json.dumps({"benchmarks": []})
    if change == "version":
        run["specdecode"]["format"] = 99
    row = extra["rows"][PROMPTS[0]]
    if change == "text":
        row["log_speedup"] = "UNSERIALIZABLE[tensor(1.)]"
    if change == "nan":
        row["seconds"]["total"] = math.nan
    if change == "huge":
        row["log_speedup"] = 800.0
    if change == "nought":
        row["counts"]["tokens"] = 0
    if change == "negative":
        row["seconds"]["draft"] = -1
    if change == "histogram":
        row["histograms"]["accepted"] = {"1": 2}
    if change == "rows":
        extra["rows"] = "none"
    if change == "list":
        run["specdecode"]["arms"]["linear"] = [1, 2]
    if change == "prompt":
        extra["rows"]["elsewhere/0"] = row
    if change == "path":
        run["specdecode"]["identity"]["hardware"] = "../../etc"
    if change == "bool":
        run["specdecode"]["floor"] = True
    if change == "empty":
        run["specdecode"]["arms"] = {}
    return json.dumps(run)


@pytest.mark.parametrize(
    "change",
    [
        *("cut", "foreign", "version", "text", "nan", "huge", "nought", "negative", "histogram", "rows"),
        *("list", "prompt", "path", "bool", "empty"),
    ],
)
def test_a_file_that_cannot_be_judged_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Guards against a damaged baseline that passes everything, or ends in a traceback."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(content({"linear": 2.0})))
    bad.write_text(_hostile(change))
    for files in ((good, bad), (bad, good)):
        assert exit_code(monkeypatch, "gate", *files) == 2
        told = capsys.readouterr().err
        assert told.startswith("specdecode: ")
        assert told.count("\n") == 1
        assert "bad.json" in told


def test_another_machines_baseline_still_judges_counters(tmp_path: Path) -> None:
    """Guards against a runner without its own baseline on which nothing is gated."""
    run = content({"linear": 2.0})
    identity = Identity(**run["specdecode"]["identity"])
    assert find(identity, tmp_path) is None
    foreign = copy.deepcopy(run)
    foreign["specdecode"]["identity"]["hardware"] = "zx-81"
    for of in (foreign, run):
        hardware = of["specdecode"]["identity"]["hardware"]
        (tmp_path / hardware).mkdir()
        (tmp_path / hardware / identity.file.name).write_text(json.dumps(of))
        found = find(identity, tmp_path)
        assert found is not None
        assert found.header.identity.hardware == hardware
    assert find(Identity("zx-81", "t", "d", "float16", "quick"), tmp_path) is None


@pytest.mark.parametrize(
    ("speedup", "options", "code"),
    [(2.0, [], 0), (1.5, [], 1), (1.5, ["--tolerance", "0.5"], 0), (3.0, ["--strict"], 0)],
)
def test_the_command_line_judges_from_the_files_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    speedup: float,
    options: list[str],
    code: int,
) -> None:
    """Guards against an exit code that a script cannot use."""
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    new.write_text(json.dumps(content({"linear": speedup})))
    old.write_text(json.dumps(content({"linear": 2.0})))
    for _ in range(2):  # the same slow code fails each time it is judged
        assert exit_code(monkeypatch, "gate", new, old, *options) == code
        assert "linear" in capsys.readouterr().out


def test_files_are_judged_by_the_tolerance_of_their_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against `specdecode gate`, `report` and `bless` that judge by another tolerance than the session did."""
    monkeypatch.chdir(tmp_path)
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    slower = content({"linear": 1.94})
    old.write_text(json.dumps(content({"linear": 2.0})))
    for tolerance, code in ((None, 0), (0.05, 0), (0.01, 1)):
        if tolerance is not None:
            slower["specdecode"]["tolerance"] = tolerance
        new.write_text(json.dumps(slower))
        assert exit_code(monkeypatch, "gate", new, old) == code
        assert exit_code(monkeypatch, "gate", new, old, "--tolerance", "0.05") == 0
        report = tmp_path / "report.md"
        assert exit_code(monkeypatch, "report", new, "--baseline", old, "--out", report) == 0
        assert ("REGRESSED" in report.read_text()) == bool(code)
    capsys.readouterr()
    assert exit_code(monkeypatch, "bless", new, "--reason", "a small tolerance") == 0
    seen = ever_sees(read(new), 0.01)
    assert seen < ever_sees(read(new))
    assert f"the same tolerance (1%) detects slowdowns of {seen:.1%}" in " ".join(capsys.readouterr().out.split())


def test_a_repository_says_what_its_arms_may_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against one tolerance for a noisy arm and a steady one, and against a tolerance per arm that `specdecode
    gate` ignores.
    """
    monkeypatch.chdir(tmp_path)
    new, old, settings = tmp_path / "new.json", tmp_path / "old.json", tmp_path / "pyproject.toml"
    new.write_text(json.dumps(content({"noisy": 1.8, "steady": 2.0})))
    old.write_text(json.dumps(content({"noisy": 2.0, "steady": 2.0})))
    assert exit_code(monkeypatch, "gate", new, old) == 1
    settings.write_text("[tool.specdecode.tolerances]\nnoisy = 0.2\n")
    assert exit_code(monkeypatch, "gate", new, old) == 0
    settings.write_text("[tool.specdecode.tolerances]\nsteady = 0.2\n")
    assert exit_code(monkeypatch, "gate", new, old) == 1
    settings.write_text("[tool.specdecode]\ntolerance = 0.2\n")
    assert exit_code(monkeypatch, "gate", new, old) == 0
    assert exit_code(monkeypatch, "gate", new, old, "--tolerance", "0.01") == 1
    settings.write_text('[tool.specdecode]\ngate = "off"\n')
    assert exit_code(monkeypatch, "gate", new, old) == 0
    assert exit_code(monkeypatch, "gate", new, old, "--strict") == 1
    settings.write_text('[tool.specdecode]\nbaselines = "blessed"\n')
    assert exit_code(monkeypatch, "bless", new, "--reason", "a test") == 0
    assert list((tmp_path / "blessed").rglob("*.json"))
    capsys.readouterr()
    assert exit_code(monkeypatch, "bless", new, "--reason", "a test", "--counters") == 0
    (counted,) = (tmp_path / "blessed" / "any").iterdir()
    said = capsys.readouterr().out.replace("\n", "")
    assert said == f"blessed as {counted.relative_to(tmp_path)}: it judges counters on any hardware, and no times"
    for wrong, reason in {
        "[tool.specdecode]\ntolerance = 1.5\n": "tolerance is 1.5, which is out of range: it is from 0 to 1",
        "[tool.specdecode]\ntarget = 3\n": "target is 3, which is no text",
        "[tool.specdecode.tolerances]\nnoisy = true\n": "noisy is True, which is no number",
        '[tool.specdecode]\ngate = "loose"\n': "gate is 'loose': choose from on, strict, off",
        "[tool.specdecode.tolerances]\nnoisy = 1.5\n": "noisy is 1.5, which is out of range: it is from 0 to 1",
        "[tool.specdecode]\neos = true\n": "tool.specdecode has no setting 'eos': choose from target",
        "[tool\n": "pyproject.toml cannot be read",
    }.items():
        settings.write_text(wrong)
        assert exit_code(monkeypatch, "gate", new, old) == 2
        err = capsys.readouterr().err
        assert reason in err
        assert err.count("\n") == 1


def test_blessing_writes_the_baseline_and_its_reason(tmp_path: Path) -> None:
    """Guards against a baseline that the next run does not find, or cannot be judged by."""
    run = tmp_path / "run.json"
    run.write_text(json.dumps(content({"linear": 2.0}) | {"machine_info": {"node": "mine", "cpu": "abacus"}}))
    file = bless([run], tmp_path / "baselines", "the first")
    assert file == tmp_path / "baselines" / "abacus-2-threads" / "t+d-float32-quick.json"
    written = json.loads(file.read_text())
    assert written["specdecode"]["reason"] == "the first"
    assert written["machine_info"] == {"cpu": "abacus"}
    assert {j.verdict for j in judge(read(run), read(file))} == {Verdict.PASS}
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_part_of_the_arms_does_not_replace_all(tmp_path: Path) -> None:
    """Guards against arms that are no longer judged, because a run of `-k linear` became the baseline."""
    run, part = tmp_path / "run.json", content({"linear": 2.0})
    run.write_text(json.dumps(content({"linear": 2.0, "tree": 2.0, "retired": 2.0})))
    file = bless([run], tmp_path / "baselines", "the first")
    part["specdecode"]["unselected"] = ["tree", "novel"]
    run.write_text(json.dumps(part))
    with pytest.raises(
        ValueError, match=r"did not select, and .*quick\.json has them \(tree\): measure without -k, or"
    ):
        bless([run], tmp_path / "baselines", "a part")
    assert "tree" in read(file).arms
    file.unlink()
    assert bless([run], tmp_path / "baselines", "a part") == file
    part["specdecode"]["unselected"] = []
    run.write_text(json.dumps(part))
    assert bless([run], tmp_path / "baselines", "a part") == file


def test_counters_are_blessed_alone_from_a_noisy_run(tmp_path: Path) -> None:
    """Guards against a gate of counters that waits for a quiet machine, and against times that it judges."""
    run, other, worse = (tmp_path / name for name in ("run.json", "other.json", "worse.json"))
    run.write_text(json.dumps(content({"linear": 2.0}, floor=0.2)))
    file = bless([run], tmp_path / "baselines", "the first", counters=True)
    assert file == tmp_path / "baselines" / "any" / "t+d-float32-quick.json"
    # Another machine's baseline of times does not come first.
    times = content({"linear": 2.0})
    times["specdecode"]["identity"]["hardware"] = "aaa"
    other.write_text(json.dumps(times))
    bless([other], tmp_path / "baselines", "times of another machine")
    worse.write_text(json.dumps(content({"linear": 1.0}, steps=2 * COUNTS["steps"])))
    old = find(read(worse).header.identity, tmp_path / "baselines")
    assert old is not None
    assert old.path == file
    verdicts = {judged.gate: judged.verdict for judged in judge(read(worse), old) if judged.arm == "linear"}
    assert verdicts == {"time": Verdict.NOT_JUDGED, "counters": Verdict.REGRESSED}
    with pytest.raises(ValueError, match="the same on all machines"):
        bless([run, worse], tmp_path / "baselines", "both", counters=True)


@pytest.mark.parametrize(
    ("speedup", "other", "verdict"),
    [(2.0, 2.0, "PASS"), (1.8, 2.0, "REGRESSED"), (1.88, 1.96, "INCONCLUSIVE"), (1.8, 1.96, "REGRESSED")],
)
def test_machines_are_blessed_together(tmp_path: Path, speedup: float, other: float, verdict: str) -> None:
    """Guards against a false slowdown that is only another machine of the same name."""
    for name, of_run in (("a.json", 2.0), ("b.json", other), ("new.json", speedup)):
        (tmp_path / name).write_text(json.dumps(content({"linear": of_run})))
    file = bless([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "baselines", "two machines")
    assert len(read(file).together) == 1
    new = read(tmp_path / "new.json")
    (judged,) = (one for one in judge(new, read(file)) if (one.arm, one.gate) == ("linear", "time"))
    assert judged.verdict.value == verdict
    assert "those on the baseline's 2 machines" in judged.reason
    assert judged.blame is not None
    assert judged.change is not None
    assert sum(judged.blame.shares.values()) == pytest.approx(-math.log(judged.change.value))
    assert ever_sees(read(file)) > ever_sees(read(tmp_path / "a.json")) - 1e-12


def test_a_machine_joins_those_of_a_baseline(tmp_path: Path) -> None:
    """Guards against machines that a baseline loses when another one is added."""
    for name in "abc":
        (tmp_path / f"{name}.json").write_text(json.dumps(content({"linear": 2.0})))
    file = bless([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "baselines", "two machines")
    bless([file, tmp_path / "c.json"], tmp_path / "baselines", "three machines")
    assert len(read(file).together) == 2
    bless([file], tmp_path / "baselines", "the same")
    assert len(read(file).together) == 2


def test_runs_of_other_things_are_not_blessed_together(tmp_path: Path) -> None:
    """Guards against a baseline that mixes runs of different prompts or lengths."""
    first, second = content({"linear": 2.0}), content({"linear": 2.0})
    second["specdecode"]["max_new_tokens"] = 50
    for name, run in (("a.json", first), ("b.json", second)):
        (tmp_path / name).write_text(json.dumps(run))
    with pytest.raises(ValueError, match="cannot be blessed with"):
        bless([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "baselines", "because")
    for version, value in (("backend", "packed"), ("turns", "steps"), ("weights", "elsewhere")):
        second = content({"linear": 2.0})
        second["specdecode"]["versions"][version] = value
        (tmp_path / "b.json").write_text(json.dumps(second))
        with pytest.raises(ValueError, match="cannot be blessed with"):
            bless([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "baselines", "because")
    second = content({"linear": 2.0})
    second["specdecode"]["identity"]["draft"] = "../d"
    (tmp_path / "b.json").write_text(json.dumps(second))
    with pytest.raises(ValueError, match="cannot be blessed with"):
        bless([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "baselines", "because")
    (tmp_path / "b.json").write_text(json.dumps(content({"linear": 1.7})))
    with pytest.raises(ValueError, match="no later run would detect"):
        bless([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "baselines", "because")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("dirty", "not committed"),
        ("no commit", "does not name its commit: measure with pytest --benchmark --benchmark-json="),
        ("commit null", "does not name its commit"),
        ("bug", "wrong outputs"),
        ("stopped", "is a run that was stopped"),
        ("beside", "was measured beside another commit"),
        ("spent", "lacks prompts, because its time budget was spent: measure again with more --budget-minutes"),
        ("failure", r"arms that did not decode \(linear\)"),
        ("noise", "no later run would detect a slowdown below 31.8% with this"),
    ],
)
def test_blessing_refuses_what_nothing_can_be_expected_by(tmp_path: Path, change: str, reason: str) -> None:
    """Guards against a baseline of unknown code, of wrong tokens, or of noise."""
    content_ = copy.deepcopy(content({"linear": 2.0}, floor=0.2 if change == "noise" else 0.01))
    if change == "dirty":
        content_["commit_info"]["dirty"] = True
    if change == "no commit":
        del content_["commit_info"]
    if change == "bug":
        content_["specdecode"]["arms"]["linear"]["bugs"] = 1.0
    if change == "commit null":
        content_["commit_info"] = None
    if change == "beside":
        content_["specdecode"]["versions"]["turns"] = "versions"
    if change in ("stopped", "spent"):
        content_["specdecode"] |= {"left": 2, "budget_spent": change == "spent"}
    if change == "failure":
        content_["specdecode"]["arms"]["linear"]["failure"] = "arm 'linear': it raised KeyError"
    run = tmp_path / "run.json"
    run.write_text(json.dumps(content_))
    with pytest.raises(ValueError, match=reason):
        bless([run], tmp_path / "baselines", "because")
    assert not (tmp_path / "baselines").exists()
    with pytest.raises(ValueError, match="reason is empty"):
        bless([run], tmp_path / "baselines", " ")


def test_the_baselines_own_arm_is_judged_by_the_peer(tmp_path: Path) -> None:
    """Guards against a slowdown of the loop that stays hidden because it slows `ar` and all other arms alike."""

    # transformers took 1 / 0.8 of our time before, and takes the same time as ours now.
    for name, peer in (("old", 0.8), ("new", 1.0)):
        speedups = {"ar": 1.0, "linear": 2.0, "hf-generate": peer}
        (tmp_path / name).write_text(json.dumps(content(speedups)))
    old, new = read(tmp_path / "old"), read(tmp_path / "new")
    verdicts = {(j.arm, j.gate): j.verdict for j in judge(new, old)}
    assert verdicts["ar", "time"] is Verdict.REGRESSED
    assert verdicts["linear", "time"] is Verdict.PASS
