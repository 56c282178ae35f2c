"""Servers as arms of `pytest --benchmark`: a fake engine, from a preset to verdicts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from specdecode.bench.gate.blame import blame
from specdecode.bench.gate.verdicts import Verdict, judge
from specdecode.bench.runs.file import read
from tests.helpers.characters import save
from tests.helpers.elsewhere import commit
from tests.helpers.root import ROOT
from tests.helpers.suites import ELSEWHERE, run_pytest_in_turn

FAKE = f"{sys.executable} {ROOT / 'tests' / 'helpers' / 'fake_server.py'} --port {{port}} --step-s 0.01"

PRESET = """
prompts = "prose@24:2"
max_new_tokens = 16
repeats = 2

[arms]
"""


Sessions = dict[str, tuple[int, str, Path]]
"""The exit code, the output and the run file, by the session's name."""


def arm(name: str, options: str, rest: str = "") -> str:
    return f'{name} = {{ server = {{ command = "{FAKE} {options}" }}{rest} }}\n'


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    """Run sessions one after the other. The first is the baseline of the others."""
    folder = tmp_path_factory.mktemp("servers")
    model = save(folder / "model", layers=1)  # the arms use its tokenizer
    load = ", concurrency = [1, 2]"
    presets = {
        "first": arm("ar", "", load) + arm("spec", "--k 3", load),
        "fewer": arm("ar", "", load) + arm("spec", "--k 1", load),
        "faults": "".join(
            [
                arm("ar", "--near"),
                arm("spec", "--k 3 --fault die --after 5"),
                arm("wrong", "--k 3 --fault 'wrong tokens'"),
                arm("tie", "--k 3 --fault tie"),
            ]
        ),
    }
    # The server of its reference arm dies once, in the second block.
    presets["dies"] = arm("ar", f"--fault die --after 9 --once {folder / 'dead'}") + arm("spec", "--k 3")
    commands, files = [], {}
    for name, arms in presets.items():
        (folder / name).mkdir()
        (folder / name / "server.toml").write_text(PRESET + arms)
        files[name] = folder / name / "run.json"
        command = [*ELSEWHERE, f"--target={model}", "--preset", f"{folder / name / 'server.toml'}"]
        command += [f"--benchmark-json={files[name]}"]
        commands.append([*command, f"--baseline={files['first']}"] if name in ("fewer", "faults") else command)
    files["resumed"] = files["dies"]
    commands.append([*commands[-1], "--resume"])
    done = run_pytest_in_turn(*commands, cwd=folder)
    return {name: (*both, file) for (name, file), both in zip(files.items(), done, strict=True)}


def test_a_preset_of_servers_is_measured(sessions: Sessions) -> None:
    """Guards against a server that is timed but not checked, or not compared with its reference arm of the same
    concurrency.
    """
    code, said, file = sessions["first"]
    assert code == 0, said
    run = read(file)
    assert list(run.arms) == ["ar", "ar-c2", "spec", "spec-c2"]
    assert [record.baseline for record in run.arms.values()] == [None, None, None, "ar-c2"]
    assert {(record.bugs, record.ties) for record in run.arms.values()} == {(0, 0)}
    # 16 tokens in 7 steps instead of 16, all of the same duration.
    assert 1.1 < run.speedup("spec").value < 16 / 7 * 1.5
    assert run.measures("spec").counters.mean_acceptance_length == pytest.approx(16 / 7)
    measures = run.measures("spec-c2")
    assert measures.counters.acceptance_rate == pytest.approx(0.5)
    assert measures.ttft_s is not None
    assert measures.ttft_p95_s is not None
    assert measures.ttft_s <= measures.ttft_p95_s
    assert run.header.versions["server of spec"] == "vllm 1.2.3 with m"
    assert len(run.arms["spec-c2"].rows["prose@24/54"].latencies.tpot) == 2 * 4


def test_a_second_run_passes_by_the_first(sessions: Sessions) -> None:
    """Guards against a server's counters that differ in each run."""
    judgements = judge(read(sessions["resumed"][2]), read(sessions["first"][2]))
    counters = {judged.arm: judged for judged in judgements if judged.gate == "counters" and "-c" not in judged.arm}
    assert {arm: judged.verdict for arm, judged in counters.items()} == {"ar": Verdict.PASS, "spec": Verdict.PASS}
    assert counters["spec"].reason.startswith("3 counters")


def test_lost_acceptance_is_blamed(sessions: Sessions) -> None:
    """Guards against a slower server without a cause."""
    code, said, file = sessions["fewer"]
    assert code == 1, said
    assert "mean_acceptance_length 2.286 -> " in " ".join(said.replace("│", " ").split())
    new, old = read(file).arms["spec"], read(sessions["first"][2]).arms["spec"]
    split = blame(new, old, list(new.rows))
    assert split is not None
    assert split.main == "acceptance length"
    assert split.shares.keys() == {"acceptance length", "time a step"}


def test_a_server_that_dies_leaves_the_rest(sessions: Sessions) -> None:
    """Guards against a session that is lost with one of its servers."""
    code, said, file = sessions["faults"]
    assert code == 1, said
    arms = read(file).arms
    assert arms["spec"].failure.startswith("arm 'spec': its server ended with exit code -9; it said: loading")
    assert len(arms["spec"].rows) == 1, "what it had decoded is kept"
    assert not any(arms[other].failure for other in ("ar", "wrong", "tie"))
    assert len(arms["tie"].rows) == 2


def test_a_wrong_output_is_told_from_a_tie(sessions: Sessions) -> None:
    """Guards against a wrong token that passes as rounding, and rounding that fails a server."""
    arms = read(sessions["faults"][2]).arms
    assert (arms["wrong"].bugs, arms["wrong"].ties) == (4, 0)
    assert (arms["tie"].bugs, arms["tie"].ties) == (0, 4)


def test_a_run_goes_on_where_its_baselines_server_died(sessions: Sessions) -> None:
    """Guards against finished blocks that are lost when the baseline's server dies."""
    code, said, _ = sessions["dies"]
    assert code == 2, said
    assert "arm 'ar': its server ended with exit code -9; it said: loading" in said
    code, said, file = sessions["resumed"]
    assert code == 0, said
    assert re.search(r"resuming: [12] of 4 blocks are there", said)
    assert len(read(file).arms["spec"].rows["prose@24/54"].repeats) == 2


def test_each_version_starts_its_own_server(tmp_path: Path) -> None:
    """Guards against `--against` that starts the same version of an engine for both commits."""
    folder, model = tmp_path / "repository", save(tmp_path / "model", layers=1)
    folder.mkdir()
    command = f"{FAKE.replace('{port}', '$1')} --k "
    (folder / "serve.sh").write_text(command + "3")
    preset = PRESET + arm("ar", "") + 'spec = { server = { command = "sh serve.sh {port}" } }\n'
    (folder / "server.toml").write_text(preset)
    (folder / ".gitignore").write_text("results")
    commit(folder)
    (folder / "serve.sh").write_text(command + "1")
    forks = ("-p", "tests.helpers.forked")
    arguments = [*ELSEWHERE, *forks, f"--target={model}", "--preset", "server.toml", "--against=HEAD"]
    ((code, said),) = run_pytest_in_turn(arguments, cwd=folder)
    words = " ".join(said.replace("│", " ").split())
    assert code == 1, said
    assert "mean_acceptance_length 2.286 -> " in words
    assert "Judged by HEAD, measured side by side with the working tree." in words
