"""Output streams: terminals that lack characters, full disks, readers that go away, closed streams."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest

import specdecode
from specdecode.bench.runs.file import run_json
from specdecode.cli import generate
from specdecode.cli.output import plain_table, say_tables
from specdecode.cli.prompts import whole_text
from tests.helpers.command_line import exit_code
from tests.helpers.models import ARCHITECTURES, build
from tests.helpers.root import ROOT
from tests.helpers.run_contents import SPEEDUPS, run_content
from tests.helpers.speed_runs import speed_arm, speed_run
from tests.helpers.spelling import characters

# A plain terminal's ASCII has three of them, and Windows' cp1252 seven.
CHARACTERS = ["\0", *"ab Äéß§τ日本语🙂Ж"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """Return a command line for each way to write, by name."""
    folder = tmp_path_factory.mktemp("output")
    model, prompts = folder / "модель", folder / "prompts.jsonl"
    run, advised = folder / "run.json", folder / "advised.json"
    shape = {"vocab_size": len(CHARACTERS), "eos_token_id": None, "initializer_range": 0.6}
    build(ARCHITECTURES["llama"] | shape).save_pretrained(model)
    characters(CHARACTERS).save_pretrained(model)
    run.write_text(json.dumps(run_content(SPEEDUPS)))
    lookup = speed_arm(1.5, {"drafter": "lookup", "k": 5})
    run_of_lookup = speed_run(identity=("abacus", "модель", "d", "float32"), lookup=lookup)
    advised.write_text(json.dumps({"specdecode": run_json(run_of_lookup)}))
    prompts.write_text('{"prompt": "日本"}\n{"prompt": "Äé"}\n')
    target = ("--target", str(model), "--device", "cpu", "--dtype", "float64", "--max-new-tokens", "40")
    return {
        "generate": ("generate", "ab 日", *target),
        "json": ("generate", "ab 日", "--json", *target),
        "prompts": ("generate", "--prompts", str(prompts), "--logprobs", *target),
        "report": ("report", str(run)),
        "recommend": ("recommend", str(advised)),
        "recommend-json": ("recommend", str(advised), "--json"),
        "gate": ("gate", str(run), str(run)),
        "fetch": ("fetch", str(model)),
        "help": ("--help",),
    }


NAMES = ["generate", "json", "prompts", "report", "recommend", "recommend-json", "gate", "fetch", "help"]

Call = Callable[..., int]


@pytest.fixture
def call(commands: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Run a command with its standard streams replaced, and return its exit code."""
    opened: list[TextIO] = []

    def run(name: str, **streams: TextIO | None) -> int:
        for stream, replacement in streams.items():
            monkeypatch.setattr(sys, stream, replacement)
        code = exit_code(monkeypatch, *commands.get(name, (name,)))
        opened.extend(getattr(sys, stream) for stream in streams)
        return code

    yield run
    for stream in opened:
        with suppress(BrokenPipeError):
            stream.close()


def output(call: Call, name: str, encoding: str) -> str:
    """Return the output of a command on a terminal with an encoding."""
    written = io.BytesIO()
    assert call(name, stdout=io.TextIOWrapper(written, encoding)) == 0
    return written.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", [name for name in NAMES if "json" not in name and name != "prompts"])
def test_what_a_terminal_cannot_show_is_replaced(
    call: Call, capfd: pytest.CaptureFixture[str], name: str, encoding: str
) -> None:
    """Guards against an answer lost because of one of its characters, and reported as a wrong input."""
    everywhere, here = output(call, name, "utf-8"), output(call, name, encoding)
    assert "specdecode: " not in capfd.readouterr().err
    if name in ("recommend", "gate"):  # tables, whose frames use other characters
        assert here.count("\n") == everywhere.count("\n")
        assert "??" not in here.replace("?" * len("модель"), "")
    else:
        assert here == everywhere.encode(encoding, "replace").decode(encoding)
    assert ("?" in here) == (name in ("generate", "report", "recommend", "fetch"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", ["json", "prompts", "recommend-json"])
def test_json_loses_nothing_on_any_terminal(call: Call, name: str, encoding: str) -> None:
    """Guards against programs that read question marks in JSON."""

    def told(encoding: str) -> list[Any]:
        lines = [json.loads(line) for line in output(call, name, encoding).split("\n")[:-1]]
        timed = {"tokens_per_second", "ttft_s"}
        return [{k: v for k, v in line.items() if k not in timed} if "text" in line else line for line in lines]

    assert told(encoding) == told("utf-8")
    assert "日" in output(call, "json", "utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_told_in_one_sentence(call: Call, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Guards against a traceback, and against exit code 0 where nothing was written."""
    assert call(name, stdout=os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")) == 2
    err = capfd.readouterr().err
    assert err.count("specdecode: the standard output cannot be written: No space left on device\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_may_go_away(call: Call, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Guards against a traceback in `specdecode ... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    assert call(name, stdout=os.fdopen(writing, "w", encoding="utf-8")) == 1
    err = capfd.readouterr().err
    assert "specdecode: " not in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["generate", "prompts", "report", "recommend", "gate"])
def test_a_closed_output_is_as_good_as_none(call: Call, name: str) -> None:
    """Guards against an AttributeError: Python has no stream where the shell closed it with `>&-`."""
    assert call(name, stdout=None) == 0
    assert call(name, stdout=None, stderr=None) == 0


def with_log(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, log: TextIO) -> Callable[..., Any]:
    """Return a load function that replaces the standard error by a log."""

    def loaded(*arguments: Any) -> Any:
        model = load(*arguments)
        monkeypatch.setattr(sys, "stderr", log)
        return model

    return loaded


class FullLog(io.StringIO):
    """A log on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["generate", "prompts"])
def test_an_answer_needs_no_log(call: Call, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Guards against an answer that is lost because its measures or its progress cannot be printed."""
    written, log = io.BytesIO(), FullLog()
    # Replace the stream after loading: transformers' own progress bar fails where it cannot be drawn.
    monkeypatch.setattr(generate, "_load", with_log(generate._load, monkeypatch, log))
    assert call(name, stdout=io.TextIOWrapper(written, "utf-8")) == 0
    assert written.getvalue().count(b"\n") == (2 if name == "prompts" else 1)
    assert sys.stderr is log


def process(arguments: tuple[str | bytes, ...], stdout: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a process of its own, under a locale."""
    return subprocess.run(
        [sys.executable, "-m", "specdecode", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )


@pytest.mark.parametrize(("name", "unbuffered"), [("report", ""), ("gate", "1")])
def test_a_process_ends_as_it_says(commands: dict[str, tuple[str, ...]], name: str, unbuffered: str) -> None:
    """Guards against exit code 120 and Python's own message about a stream that it cannot flush."""
    with open("/dev/full", "wb") as full:
        done = process(commands[name], full, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"specdecode: the standard output cannot be written")
    reading, writing = os.pipe()
    os.close(reading)
    done = process(commands[name], writing, PYTHONUNBUFFERED=unbuffered)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_plain_locale_is_no_fault(commands: dict[str, tuple[str, ...]]) -> None:
    """Guards against a report that only the tests' own encoding can write."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = process(commands["report"], subprocess.PIPE, **ascii_only)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"| tokens/s |" in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_a_library_has_not_yet_written_is_not_lost_in_silence(unbuffered: str) -> None:
    """Guards against exit code 0, or Python's own message, for a program whose last lines are lost."""
    code = "import sys; from specdecode import cli; cli.app = lambda: sys.stdout.write('the last line'); cli.main()"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_names_in_tables_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a path of a model that `specdecode doctor` shows without its brackets, or that ends it."""
    table = plain_table("model[a]")
    table.add_row("/models/b[bold] :smile: [/x]")
    say_tables(table)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "model[a]",
        "/models/b[bold] :smile: [/x]",
    ]


def test_texts_of_the_command_line_are_in_utf_8() -> None:
    """Guards against a plain locale in which every non-ASCII character becomes surrogates."""
    assert whole_text("plain τ", "the prompt") == "plain τ"
    assert whole_text("Привет".encode().decode("ascii", "surrogateescape"), "the prompt") == "Привет"
    for broken in (b"caf\xe9".decode("utf-8", "surrogateescape"), "half \ud800"):
        with pytest.raises(ValueError, match=r"the prompt is 'caf\\udce9', which is no text|'half \\ud800'"):
            whole_text(broken, "the prompt")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "caf\udce9"], "the prompt is 'caf\\udce9', which is no text in UTF-8"),
        (["generate", "x", "--stop", "caf\udce9"], "a stop string is 'caf\\udce9', which is no text in UTF-8"),
        (["bless", "{run}", "--reason", "caf\udce9"], "the reason is 'caf\\udce9', which is no text in UTF-8"),
        (["generate", "x", "--target", "caf\udce9"], "caf\\udce9"),
        (["generate", "x", "--draft", "caf\udce9"], "caf\\udce9"),
        (["generate", "x", "--head", "caf\udce9"], "caf\\udce9"),
        (["generate", "x", "--dtype", "caf\udce9"], "caf\\udce9"),
        (["generate", "x", "--drafter", "caf\udce9"], "caf\\udce9"),
        (["generate", "--prompts", "caf\udce9"], "caf\\udce9"),
        (["report", "caf\udce9"], "caf\\udce9"),
        (["recommend", "--target", "x", "--preset", "caf\udce9"], "caf\\udce9"),
        (["recommend", "--target", "shape:tiny", "--prompts", "caf\udce9"], "caf\\udce9"),
        (["train-head", "--out", "x.safetensors", "--layers", "caf\udce9"], "caf\\udce9"),
        (["fetch", "caf\udce9"], "caf\\udce9"),
    ],
)
def test_an_argument_that_is_no_text_is_told(
    commands: dict[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    reason: str,
) -> None:
    """Guards against a traceback from inside a tokenizer, or from the message itself."""
    run = commands["report"][1]
    monkeypatch.chdir(tmp_path)
    assert exit_code(monkeypatch, *(argument.format(run=run) for argument in arguments)) == 2
    err = capfd.readouterr().err
    assert reason in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("train-head", "--out", "{file}/head"),
        ("train-head", "--out", "{folder}/taken"),
        ("train-head", "--out", "{folder}/blocked"),
        ("recommend", "--target", "shape:tiny", "--out", "{file}/run.json"),
        ("recommend", "--target", "shape:tiny", "--out", "{folder}"),
        ("report", "{run}", "--figures", "{folder}/figures", "--out", "{file}/report.md"),
    ],
)
def test_a_file_is_known_to_be_unwritable_before_the_work(
    commands: dict[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
) -> None:
    """Guards against minutes or hours of work whose result cannot be written."""

    def load(*of: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(specdecode, "load", load)
    monkeypatch.setattr("specdecode.bench.plan.load", load)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken" / "README.md").mkdir(parents=True)
    (tmp_path / "blocked-work").write_text("where the shards go")
    names = {"file": tmp_path / "file", "folder": tmp_path, "run": commands["report"][1]}
    assert exit_code(monkeypatch, *(argument.format(**names) for argument in arguments)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written: " in err
    if "{file}" in arguments[-1]:
        assert f"{tmp_path / 'file'} is no folder" in err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken", "blocked-work"}
