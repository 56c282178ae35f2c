"""vLLM as arms of `pytest --benchmark`: the real engine, on the embedded model, without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from specdecode import FixedK, HeadDrafter, generate, load, load_head
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.servers import ServerArm
from specdecode.bench.gate.verdicts import Judgement, Verdict, judge
from specdecode.bench.runs.file import read
from specdecode.bench.runs.records import RunFile
from specdecode.bench.servers.errors import ServerError
from specdecode.bench.servers.server import Server
from specdecode.bench.servers.spec import ServerSpec
from specdecode.drafters.base import common_prefix
from specdecode.evals.data import token_prompts
from specdecode.models.chat import Codec, TextEncoder
from specdecode.models.embedded import fetch
from tests.helpers.suites import ELSEWHERE, run_pytest_in_turn

PYTHON = os.environ.get("SPECDECODE_VLLM_PYTHON")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="needs SPECDECODE_VLLM_PYTHON, a Python that has vLLM; tox -e vllm makes one"
)

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
COMMAND = (
    f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {{target}} --served-model-name smollm2 --port {{port}}"
    " --max-model-len 1024 --max-num-seqs 4 --enforce-eager --dtype float32 --no-enable-prefix-caching"
)
START_MINUTES = 10.0

PROMPTS = "prose@24:34,humaneval:6"
FEWER_PROMPTS = "prose@24:8"  # the first of PROMPTS
TOKENS = 16
DRAFT_LENGTH = 5


def speculating(**config: Any) -> str:
    """Return the command of a server that speculates, and reports the acceptance of each request."""
    return f"{COMMAND} --per-request-spec-decode-metrics summary --speculative-config '{json.dumps(config)}'"


def lookup(length: int) -> str:
    return speculating(method="ngram", num_speculative_tokens=length, prompt_lookup_max=3, prompt_lookup_min=1)


# The target is its own draft: there is no smaller model of its vocabulary. Except for rounding, all proposals are
# accepted.
DRAFT = speculating(method="draft_model", model="{target}", num_speculative_tokens=3)

OURS = speculating(method="custom_class", model="vllm_proposer.Proposer", num_speculative_tokens=DRAFT_LENGTH)


def server(command: str, log: Path, **environment: str) -> Server:
    """Return a server of the suite, for the embedded model."""
    spec = ServerSpec(command=command, environment={**ENVIRONMENT, **environment}, start_minutes=START_MINUTES)
    return Server(spec, {"target": str(fetch()), "draft": ""}, Codec(None), log)


def arm(name: str, command: str, rest: str = "") -> str:
    """Return an arm's line of a preset."""
    environment = ", ".join(f'{key} = "{value}"' for key, value in ENVIRONMENT.items())
    return f"{name} = {{ server = {{ command = '''{command} ''', environment = {{ {environment} }} }}{rest} }}\n"


@dataclass(frozen=True)
class Session:
    """A session of the suite: its exit code, its output, and its run file."""

    code: int
    said: str
    run: RunFile

    def judged(self, by: Session, gate: str) -> dict[str, Judgement]:
        """Return the verdicts by another session, by arm."""
        return {one.arm: one for one in judge(self.run, by.run) if one.gate == gate and one.arm in self.run.arms}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """Run two sessions. The first is the baseline of the second: `ar` and `ngram` are the same in both, and `cut`
    differs.
    """
    folder = tmp_path_factory.mktemp("vllm")
    same = arm("ar", COMMAND) + arm("ngram", lookup(DRAFT_LENGTH))
    presets = {
        "first": (PROMPTS, same + arm("cut", lookup(DRAFT_LENGTH)) + arm("draft", DRAFT)),
        "second": (FEWER_PROMPTS, same + arm("cut", lookup(1))),
    }
    commands = []
    for name, (prompts, arms) in presets.items():
        (folder / name).mkdir()
        preset = folder / name / "vllm.toml"
        preset.write_text(f'prompts = "{prompts}"\nmax_new_tokens = {TOKENS}\nrepeats = 1\n\n[arms]\n{arms}')
        command = [*ELSEWHERE, "--preset", str(preset)]
        command += [f"--benchmark-json={folder / name / 'run.json'}"]
        commands.append(command if name == "first" else [*command, f"--baseline={folder / 'first' / 'run.json'}"])
    done = run_pytest_in_turn(*commands, cwd=folder)
    assert all((folder / name / "run.json").exists() for name in presets), "\n".join(said for _, said in done)
    return {
        name: Session(code, said, read(folder / name / "run.json"))
        for name, (code, said) in zip(presets, done, strict=True)
    }


def test_speculation_changes_no_token(sessions: dict[str, Session], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against an engine whose speculation is not exact, and against one that does not speculate."""
    first = sessions["first"]
    with capsys.disabled():
        print(first.said[first.said.find("= speed =") :])  # noqa: T201  this run is for the measured figures
    assert first.code == 0, first.said
    run = first.run
    assert {name: (record.bugs, record.ties, len(record.rows)) for name, record in run.arms.items()} == {
        name: (0, 0, 40) for name in ("ar", "ngram", "cut", "draft")
    }
    lengths = {name: run.measures(name).counters.mean_acceptance_length for name in run.arms}
    assert lengths["ar"] == 1
    assert 1.05 < lengths["ngram"] < 1 + DRAFT_LENGTH
    assert 3 < lengths["draft"] <= 4
    assert run.measures("draft").counters.acceptance_rate > 0.99
    assert run.header.versions["server of ngram"].startswith("vllm 0.")


def test_a_second_run_passes_by_the_first(sessions: dict[str, Session]) -> None:
    """Guards against counters of the engine that include other requests, such as the warm-up."""
    judged = sessions["second"].judged(sessions["first"], "counters")
    assert {name: judged[name].verdict for name in ("ar", "ngram")} == dict.fromkeys(("ar", "ngram"), Verdict.PASS), (
        judged
    )


def test_a_shorter_draft_is_found_and_blamed(sessions: dict[str, Session], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against an engine option that slows decoding and is not reported because all outputs stay equal."""
    second, first = sessions["second"], sessions["first"]
    counters, time_ = (second.judged(first, gate)["cut"] for gate in ("counters", "time"))
    with capsys.disabled():
        print(f"\ncounters: {counters.verdict.value}: {counters.reason}")  # noqa: T201
        print(f"time: {time_.verdict.value}: {time_.reason}")  # noqa: T201
    assert second.run.arms["cut"].bugs == 0
    assert "mean_acceptance_length" in second.said, second.said
    assert counters.verdict is Verdict.REGRESSED
    assert "mean_acceptance_length" in counters.reason
    if time_.verdict is Verdict.REGRESSED:
        assert "mostly acceptance length" in time_.reason


@dataclass(frozen=True)
class Replayed:
    """The acceptance of one output's drafts, counted here token by token.

    Attributes:
        steps: forwards of the target, including the prefill.
        drafted, accepted: proposed tokens, and the accepted ones.
        histogram: the number of drafts by accepted tokens, from 0 on.
        cut: tokens that the last step committed beyond the output's end.
    """

    steps: int
    drafted: int
    accepted: int
    histogram: list[int]
    cut: int


def replay(
    drafts: Sequence[dict[str, list[int]]], prompt: Sequence[int], longer: Sequence[int], length: int
) -> Replayed:
    """Verify drafts as greedy decoding does.

    Args:
        drafts: in the order of proposing, each with the text before it.
        prompt: of the output.
        longer: the output, followed by at least as many tokens as a draft has.
        length: of the output.
    """
    steps, place, drafted, kept = 1, 1, 0, []
    while place < length:
        text = [*prompt, *longer[:place]]
        draft = next(one["draft"] for one in drafts if one["text"] == text)
        accepted = common_prefix(draft, longer[place:])
        if draft:
            kept.append(accepted)
        drafted += len(draft)
        steps, place = steps + 1, place + accepted + 1
    return Replayed(steps, drafted, sum(kept), [kept.count(size) for size in range(DRAFT_LENGTH + 1)], place - length)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Return a server whose drafts are this package's, and their log."""
    folder = tmp_path_factory.mktemp("ours")
    log = folder / "drafts.jsonl"
    ours = server(OURS, folder / "ours.log", PYTHONPATH=str(Path(__file__).parent), SPECDECODE_DRAFTS=str(log))
    yield ours, log
    ours.close()


def test_the_engines_counters_are_those_of_a_replay(
    logged: tuple[Server, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against acceptance read from the wrong counter, or from other requests than the timed one."""
    ours, log = logged
    arm = ServerArm(ArmSpec.from_entry("ours", {"server": {"command": OURS}}), ours)
    encoder = TextEncoder("smollm2-135m", AutoTokenizer.from_pretrained(fetch()))
    prompts, _ = token_prompts("prose@24:6,humaneval:4", encoder)
    rows = []
    for name, prompt in prompts.items():
        arm.run(prompt, TOKENS, ())  # warms up
        longer = arm.run(prompt, TOKENS + DRAFT_LENGTH + 1, ()).tokens
        before = len(log.read_text().splitlines())
        run = arm.run(prompt, TOKENS, ())
        time.sleep(0.1)
        drafts = [json.loads(line) for line in log.read_text().splitlines()[before:]]
        assert run.tokens == longer[:TOKENS]
        told = replay(drafts, prompt, longer, TOKENS)
        rows.append((name, told, run))
        assert (run.counts.drafted, run.counts.accepted) == (told.drafted, told.accepted), (name, told, run.counts)
        assert run.histograms.accepted == told.histogram, (name, told, run.histograms)
        assert told.steps - told.cut <= run.counts.steps <= told.steps, (name, told, run.counts)
    with capsys.disabled():
        print()  # noqa: T201
        for name, told, run in rows:
            print(f"{name}: replayed {told}; engine {run.counts.steps:g} steps")  # noqa: T201
    assert sum(told.accepted for _, told, _ in rows) > 10
    assert sum(told.drafted for _, told, _ in rows) > sum(told.accepted for _, told, _ in rows)


def test_a_head_that_is_trained_here_is_served(tmp_path: Path) -> None:
    """Guards against a folder that the engine cannot read, against a draft that changes its tokens, and against an
    engine that accepts less of the head than this package: it is wired otherwise then. Minutes of training are enough
    for the first word of many.
    """
    target, folder = load("smollm2-135m", device="cpu"), tmp_path / "head"
    sizes = (
        "--tokens",
        "8192",
        "--own",
        "0",
        "--vocabulary",
        "2048",
        "--epochs",
        "2",
        "--rate",
        "0.002",
        "--held-out",
        "4",
    )
    training = [sys.executable, "-m", "specdecode", "train-head", "--target", "smollm2-135m", "--data", "prose", *sizes]
    subprocess.run([*training, "--out", str(folder)], check=True)
    drafter = HeadDrafter(load_head(str(folder), target))
    command = speculating(method="eagle3", model=str(folder), num_speculative_tokens=3)
    drafting = server(command, tmp_path / "head.log")
    steps = []
    try:
        arm = ServerArm(ArmSpec.from_entry("head", {"server": {"command": command}}), drafting)
        prompts, _ = token_prompts("prose@24:4,humaneval:1", target)
        for prompt in prompts.values():
            ours = generate(target, prompt, drafter=drafter, controller=FixedK(3), max_new_tokens=2 * TOKENS)
            run = arm.run(prompt, 2 * TOKENS, ())
            assert run.tokens == ours.tokens
            steps.append((run.counts.steps, len(ours.steps)))
    finally:
        drafting.close()
    theirs, here = map(sum, zip(*steps, strict=True))
    assert here < 0.95 * len(prompts) * 2 * TOKENS, steps
    assert abs(theirs - here) <= 0.03 * here, steps


def test_no_worker_outlives_a_server_that_is_killed(logged: tuple[Server, Path]) -> None:
    """Guards against an engine's workers that keep the memory after their server has died."""
    ours, _ = logged
    # The process that runs other tests' suites is not the engine's, and stays.
    others = psutil.Process().children(recursive=True)
    ours.open()
    prompt = [list(range(100, 140))]
    ours.generate(prompt, 8, 1, 120)
    below = [one for one in psutil.Process().children(recursive=True) if one not in others]
    engine = [one for one in below if "python" in one.name().lower() or "vllm" in one.name().lower()]
    (api,) = [
        one for one in below if "api_server" in " ".join(one.cmdline()) and "keeper.py" not in " ".join(one.cmdline())
    ][:1]
    assert len(engine) >= 3, below
    with killed(api, 0.7), pytest.raises(ServerError, match="its server ended with exit code -9; it said: "):
        ours.generate(prompt, 400, 1, 120)
    ours.close()
    assert not psutil.wait_procs(below, timeout=20)[1]


@contextmanager
def killed(process: psutil.Process, after_s: float) -> Iterator[None]:
    """Kill a process while the body of the context runs."""
    timer = threading.Timer(after_s, lambda: process.send_signal(signal.SIGKILL))
    timer.start()
    yield
    timer.join()
