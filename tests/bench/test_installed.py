"""The installed plugin, in repositories of other people: `pytest` in folders of its own, in processes of their own."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from specdecode.bench.runs.file import read
from tests.helpers.elsewhere import Runs, commit, runs_in

SIZES = ("--tiny", "--prompts=prose:1", "--max-new-tokens=4", "--device=cpu", "--dtype=float32", "--backend=eager")
LOOKUP = ("-k", "lookup and not hf and not aware")


@pytest.fixture
def elsewhere(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return runs_in(tmp_path, tmp_path_factory.mktemp("packages"))


def test_the_suite_runs_in_an_empty_folder(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a suite that only its own checkout can run."""
    done = elsewhere("--benchmark", *SIZES, *LOOKUP, "--benchmark-json=results/run.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lookup" in done.stdout
    assert "No baseline" in done.stdout
    assert [file.name for file in (tmp_path / "results").glob("[!.]*")] == ["run.json"]


def test_other_plugins_keep_their_options(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a repository that cannot be tested any more because its own `--device` is taken."""
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
    """Guards against seconds of loading in every session, and against tests left out for the name of their folder."""
    (tmp_path / "perf").mkdir()
    (tmp_path / "perf" / "test_own.py").write_text(
        "import sys\ndef test_own():\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    for arguments in ((), ("-n", "2"), ("-p", "no:specdecode")):
        done = elsewhere("-p", "no:jaxtyping", *arguments)  # whose plugin brings numpy
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 passed" in done.stdout


def test_a_repository_has_its_settings(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against options that everybody has to remember, and against a setting that is mistyped and ignored."""
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
    """Guards against a list of tests that loads a model first."""
    done = elsewhere("--benchmark", "--collect-only", "-q", *SIZES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_speed.py::test_speed[lookup]" in done.stdout
    assert "test_gate.py::test_gate[lookup-time]" in done.stdout


DECODER = """
import time
import specdecode

def make(target, draft, device, dtype, wait=0.0, wrong=False):
    model = specdecode.load(target, device=device, dtype=dtype, backend="eager")
    def decode(prompt, count):
        time.sleep(wait)
        tokens = specdecode.generate(model, prompt, max_new_tokens=count).tokens
        for token in tokens:
            yield [model.vocab_size - 1 - token if wrong else token]
    return decode
"""


def test_a_decoder_of_the_readers_own_is_gated(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a slowdown, or a wrong token, of somebody's own decoder that passes."""
    (tmp_path / "decoder.py").write_text(DECODER)
    sizes = [size for size in SIZES if size != "--tiny"]

    def run(*arguments: str, **options: object) -> CompletedProcess[str]:
        table = ", ".join(f"{key} = {str(value).lower()}" for key, value in options.items())
        (tmp_path / "own.toml").write_text(
            'prompts = "prose:1"\nmax_new_tokens = 4\nrepeats = 3\n[arms]\nar = {}\n'
            f'mine = {{ call = "decoder:make", options = {{ {table} }} }}\n'
        )
        common = ("--target=shape:tiny", "--preset=own.toml", "--tolerance=0.6")
        return elsewhere("--benchmark", *sizes, *common, *arguments)

    done = run("--benchmark-json=first.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine" in done.stdout
    done = run("--baseline=first.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REGRESSED" not in done.stdout
    done = run("--baseline=first.json", wait=1.0)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "REGRESSED: mine time" in done.stdout
    done = run(wrong=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mine gave other tokens than ar on" in done.stdout


ENGINE = """
import time

def make(target, draft, device, dtype, kind):
    def decode(prompt, count):
        if kind == FAILING:
            raise RuntimeError("no licence")
        time.sleep(SECONDS * (0.5 if kind == "drafting" else 1.0))
        yield [sum(prompt) % 7] * count
    return decode
"""

ENGINE_PRESET = """
prompts = "prose:2"
max_new_tokens = 8
repeats = 1
baseline = "plain"
[arms]
"""


def test_an_engine_is_gated_against_itself_and_its_last_commit(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a model of ours loaded for somebody's engine, and against a comparison of two commits that runs
    the same code twice, or that an arm which fails in one of them ends."""
    (tmp_path / "src" / "engine").mkdir(parents=True)
    decoding = tmp_path / "src" / "engine" / "decoding.py"

    def write(seconds: float, failing: str) -> None:
        decoding.write_text(ENGINE.replace("SECONDS", str(seconds)).replace("FAILING", repr(failing)))

    write(0.04, failing="none")
    kinds = ("plain", "drafting", "copy")
    arms = "".join(f'{kind} = {{ call = "engine.decoding:make", options = {{ kind = "{kind}" }} }}\n' for kind in kinds)
    (tmp_path / "own.toml").write_text(ENGINE_PRESET + arms)
    (tmp_path / "pyproject.toml").write_text('[tool.specdecode]\ntarget = "somebody/engine"\npreset = "own.toml"\n')
    commit(tmp_path)
    done = elsewhere("--benchmark", "--benchmark-json=run.json")
    assert done.returncode == 0, done.stdout + done.stderr
    run = read(tmp_path / "run.json")
    assert 1.7 < run.speedup("drafting").value < 2.3
    assert (run.header.baseline, run.header.roofline) == ("plain", 0.0)
    assert "somebody/engine, which arms load" in done.stdout
    assert "as bytes (somebody/engine has no tokenizer)" in done.stdout

    write(0.08, failing="copy")
    done = elsewhere("--benchmark", "--against=HEAD")
    assert done.returncode == 1, done.stdout + done.stderr
    for kind in ("plain", "drafting"):
        assert f"REGRESSED: {kind} time" in done.stdout
    assert "REGRESSED: copy time: arm 'copy': it raised RuntimeError: no licence" in done.stdout
