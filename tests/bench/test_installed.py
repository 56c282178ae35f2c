"""The installed plugin in users' repositories: `pytest` in folders of its own, in processes of their own."""

from __future__ import annotations

import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from specdecode.bench.gate.baselines import bless
from specdecode.bench.runs.file import read
from tests.helpers.characters import save
from tests.helpers.elsewhere import Runs, commit, runs_in

SIZES = ("--tiny", "--prompts=prose:1", "--max-new-tokens=4", "--device=cpu", "--dtype=float32", "--backend=eager")
LOOKUP = ("-k", "lookup and not hf and not aware")


@pytest.fixture
def elsewhere(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return runs_in(tmp_path, tmp_path_factory.mktemp("packages"))


def test_the_suite_runs_in_an_empty_folder(
    elsewhere: Runs, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Guards against a suite that runs only in its own checkout, or that writes results into the model's folder."""
    model = save(tmp_path_factory.mktemp("model"))
    done = elsewhere("--benchmark", *SIZES, *LOOKUP, "--target", str(model), "--benchmark-json=results/run.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lookup" in done.stdout
    assert "No baseline" in done.stdout
    assert [file.name for file in (tmp_path / "results").glob("[!.]*")] == ["run.json"]
    assert not (model / "results").exists()


def test_other_plugins_keep_their_options(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a repository whose tests fail because this plugin takes its `--device` option."""
    (tmp_path / "late.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--dtype', default='theirs')\n"
    )
    (tmp_path / "conftest.py").write_text(
        "pytest_plugins = ['late']\ndef pytest_addoption(parser):\n    parser.addoption('--device', default='none')\n"
    )
    (tmp_path / "test_it.py").write_text(
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.getoption('device') == 'tpu'\n"
        "    assert pytestconfig.getoption('dtype') == 'theirs'\n"
    )
    done = elsewhere("--device=tpu", "test_it.py", PYTHONSAFEPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    free = [size for size in SIZES if not size.startswith(("--device", "--dtype"))]
    done = elsewhere("--benchmark", *free, *LOOKUP, "--specdecode-device=cpu", "--specdecode-dtype=float64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float64" in done.stdout
    listed = elsewhere("--help").stdout
    assert "--specdecode-device" in listed
    assert "--specdecode-target=" in listed
    assert " --target=" in listed


def test_it_does_nothing_unless_it_is_asked(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against seconds of imports in every session, and against a user's tests skipped because of their folder's
    name.
    """
    (tmp_path / "perf").mkdir()
    (tmp_path / "perf" / "test_own.py").write_text(
        "import sys\ndef test_own():\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    for arguments in ((), ("-n", "2"), ("-p", "no:specdecode")):
        done = elsewhere("-p", "no:jaxtyping", *arguments, alone=True)  # jaxtyping's plugin imports numpy
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 passed" in done.stdout


def test_a_repository_has_its_settings(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against options that every user has to type, and against a mistyped setting that is ignored."""
    settings = tmp_path / "pyproject.toml"
    settings.write_text(
        '[tool.specdecode]\ntarget = "shape:tiny"\nprompts = "prose:1"\nbaselines = "blessed"\ndevice = "cpu"\n'
        'tolerance = 0.5\ndtype = "float64"\n[tool.specdecode.tolerances]\nlookup = 0.9\n'
    )
    done = elsewhere("--benchmark", "--max-new-tokens=4", "--dtype=float32", *LOOKUP)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "blessed/" in done.stdout
    assert "float32" in done.stdout
    settings.write_text('[tool.specdecode]\ntargett = "shape:tiny"\n')
    done = elsewhere("--benchmark", *SIZES, *LOOKUP)
    assert done.returncode == 2
    assert "tool.specdecode has no setting 'targett': choose from target, draft" in done.stdout + done.stderr


def test_the_suite_is_listed(elsewhere: Runs) -> None:
    """Guards against a list of tests that first loads a model."""
    done = elsewhere("--benchmark", "--collect-only", "-q", *SIZES, "--target=./nowhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_speed.py::test_speed[lookup]" in done.stdout
    assert "test_gate.py::test_gate[lookup-time]" in done.stdout


DECODER = """
import specdecode

def make(target, draft, device, dtype, wrong):
    model = specdecode.load(target, device=device, dtype=dtype, backend="eager")
    def decode(prompt, count):
        tokens = specdecode.generate(model, prompt, max_new_tokens=count).tokens
        for token in tokens:
            yield [model.vocab_size - 1 - token if wrong else token]
    return decode
"""


def test_a_decoder_of_the_readers_own_is_checked(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a user's own decoder that passes with a wrong token."""
    (tmp_path / "decoder.py").write_text(DECODER)
    sizes = [size for size in SIZES if size != "--tiny"]

    def run(wrong: str) -> CompletedProcess[str]:
        (tmp_path / "own.toml").write_text(
            'prompts = "prose:1"\nmax_new_tokens = 4\nrepeats = 1\n[arms]\nar = {}\n'
            f'mine = {{ call = "decoder:make", options = {{ wrong = {wrong} }} }}\n'
        )
        return elsewhere("--benchmark", *sizes, "--target=shape:tiny", "--preset=own.toml")

    done = run(wrong="false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine" in done.stdout
    done = run(wrong="true")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mine gave other tokens than ar on" in done.stdout


ENGINE = """
import os
import time
from specdecode.bench.arms.callables import ArmStep

# The engine's steps take time of this clock, and nothing else does: so no load of the machine hides a slowdown.
now = time.perf_counter()
time.perf_counter = lambda: now

def wait(seconds):
    global now
    now += seconds

def make(target, draft, device, dtype, kind):
    drafting = kind == "drafting"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"

    def decode(prompt, count):
        if kind == FAILING:
            raise RuntimeError("no licence")
        for start in range(0, count, 4 if drafting else 2):
            tokens = [sum(prompt) % 7] * min(count - start, 4 if drafting else 2)
            drafted = [wait(DRAFT_S), len(tokens)][1] if drafting else 0
            wait(VERIFY_S)
            yield ArmStep(tokens, drafted, drafted - drafting, draft_s=DRAFT_S * drafting, verify_s=VERIFY_S)

    return decode
"""

ENGINE_PRESET = """
prompts = "prose:2"
max_new_tokens = 8
repeats = 1
baseline = "plain"
[arms]
"""


def test_an_engine_is_gated_by_its_past(elsewhere: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against our model loaded for a user's engine, and against a slowdown that passes or is blamed on another
    part.

    Also against a comparison of two commits that runs the same code twice, or that stops when an arm fails in one of
    them; and against processes that do not ask for large memory pages.
    """
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    (tmp_path / "src" / "engine").mkdir(parents=True)
    decoding = tmp_path / "src" / "engine" / "decoding.py"

    def write(draft_s: float = 0.04, verify_s: float = 0.08, failing: str = "none") -> None:
        text = ENGINE.replace("DRAFT_S", str(draft_s)).replace("VERIFY_S", str(verify_s))
        decoding.write_text(text.replace("FAILING", repr(failing)))

    write()
    kinds = ("plain", "drafting", "copy")
    arms = "".join(f'{kind} = {{ call = "engine.decoding:make", options = {{ kind = "{kind}" }} }}\n' for kind in kinds)
    (tmp_path / "own.toml").write_text(ENGINE_PRESET + arms)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.specdecode]\ntarget = "somebody/engine"\npreset = "own.toml"\ntolerance = 0.2\n'
    )
    commit(tmp_path)
    done = elsewhere("--benchmark", "--benchmark-json=run.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "somebody/engine, which arms load" in done.stdout
    assert "as bytes (somebody/engine has no tokenizer)" in done.stdout
    run = read(tmp_path / "run.json")
    assert 1.1 < run.speedup("drafting").value < 1.5  # 4 steps of 80 ms over 2 of 120 ms
    assert (run.header.baseline, run.header.roofline) == ("plain", 0.0)
    bless([tmp_path / "run.json"], tmp_path / "baselines", "the first")

    done = elsewhere("--benchmark")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout
    write(draft_s=0.16)
    done = elsewhere("--benchmark")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search("REGRESSED: drafting time: .*; mostly drafting", done.stdout)
    assert "REGRESSED: copy" not in done.stdout

    write(verify_s=0.16, failing="copy")
    done = elsewhere("-p", "tests.helpers.forked", "--benchmark", "--against=HEAD")
    assert done.returncode == 1, done.stdout + done.stderr
    for kind in ("plain", "drafting"):
        assert f"REGRESSED: {kind} time" in done.stdout
    assert "REGRESSED: copy time: arm 'copy': it raised RuntimeError: no licence" in done.stdout
