"""`transformers serve` as arms of `pytest --benchmark`: a server that speculates, accepts text alone, and miscounts."""

from __future__ import annotations

import json
import os
import re

import pytest

from specdecode.bench.runs.file import read
from specdecode.bench.runs.records import RunFile
from tests.helpers.suites import ELSEWHERE, run_pytest_in_turn

PROGRAM = os.environ.get("SPECDECODE_TRANSFORMERS_SERVE")

pytestmark = pytest.mark.skipif(
    not PROGRAM,
    reason="needs SPECDECODE_TRANSFORMERS_SERVE, the `transformers` program of transformers[serving]; tox -e"
    " transformers-serve makes one",
)

TOKENS, PROMPTS = 48, 4
PRESET = f'prompts = "humaneval:{PROMPTS}"\nmax_new_tokens = {TOKENS}\nrepeats = 1\n\n[arms]\n'


def arm(name: str, **config: object) -> str:
    """Return an arm's line of a preset. Each request has a generation config without stop tokens."""
    whole = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 2, "eos_token_id": [], **config}
    command = f"{PROGRAM} serve {{target}} --host 127.0.0.1 --port {{port}} --device cpu"
    return (
        f"{name} = {{ server = {{ command = '{command}', environment = {{ HF_HUB_OFFLINE = '1' }}, prompt = 'text',"
        f" request = {{ generation_config = '{json.dumps(whole)}' }} }} }}\n"
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, RunFile]:
    """Return a session's exit code, its output, and its run file."""
    folder = tmp_path_factory.mktemp("serve")
    preset, file = folder / "serve.toml", folder / "run.json"
    preset.write_text(PRESET + arm("ar") + arm("again") + arm("lookup", prompt_lookup_num_tokens=5))
    command = [*ELSEWHERE, "--preset", str(preset)]
    ((code, said),) = run_pytest_in_turn([*command, f"--benchmark-json={file}"], cwd=folder)
    assert file.exists(), said
    return code, said, read(file)


def test_text_comes_back_equal(session: tuple[int, str, RunFile]) -> None:
    """Guards against token ids that change when the same text is encoded again, and outputs that stop tokens
    cut short.
    """
    _, said, run = session
    assert not run.arms["again"].failure, said
    assert (run.arms["again"].bugs, run.arms["again"].ties, len(run.arms["again"].rows)) == (0, 0, PROMPTS)
    assert run.measures("ar").counters.mean_acceptance_length == pytest.approx(1, abs=0.1)


def test_a_server_that_miscounts_is_void(session: tuple[int, str, RunFile], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a speedup over an unknown number of tokens.

    A stream of transformers 5 counts a step of prompt lookup as one token.
    """
    code, said, run = session
    with capsys.disabled():
        print(f"\nlookup: {run.arms['lookup'].failure or said}")  # noqa: T201
    assert code == 1, said
    assert re.fullmatch(
        r"arm 'lookup': its server counts \d+ tokens, and the text that it sends has \d+", run.arms["lookup"].failure
    )
