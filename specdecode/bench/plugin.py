"""The pytest plugin: `--benchmark` measures every arm of a preset, and replays the times through pytest-benchmark.

Importing it is cheap: torch and the models are loaded when the first benchmark is collected.
"""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from specdecode.bench.gate import Judgement
    from specdecode.bench.measure import Results
    from specdecode.bench.runs import Header, Identity, RunFile
    from specdecode.lm import LM

_TABLE_WIDTH = 130
_SUITES = {"benchmark": "perf", "quality": "quality"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("specdecode")
    group.addoption("--benchmark", action="store_true", help="measure speed: run the suite in perf/")
    group.addoption("--quality", action="store_true", help="measure quality: run the suite in quality/")
    group.addoption("--preset", default="quick", help="arms, prompts and lengths: a name or a .toml file [quick]")
    group.addoption("--target", default="smollm2-135m", help="target model, as specdecode.load takes it [smollm2-135m]")
    group.addoption(
        "--draft", default=None, help="draft model; 'layers:0-9,29' takes these layers of the target [a subset of them]"
    )
    group.addoption("--device", default=None, help="cpu, cuda, cuda:1 ... [the first GPU, else the CPU]")
    group.addoption("--dtype", default=None, help="float32, float16, bfloat16 [float32 on a CPU, float16 on a GPU]")
    group.addoption("--max-new-tokens", type=int, default=None, help="length of every output [as the preset says]")
    group.addoption(
        "--prompts", default=None, help="data sets and counts, as in humaneval:4,prose:4 [as the preset says]"
    )
    group.addoption(
        "--gate",
        default="on",
        choices=["on", "off", "strict"],
        help="fail on REGRESSED and MISSING, on nothing, or on all but PASS and IMPROVED [on]",
    )
    group.addoption("--tolerance", type=float, default=None, help="share by which a time may be worse [0.05]")
    group.addoption("--baseline", default=None, help="run file to judge by [the one for this hardware in baselines/]")


def pytest_configure(config: pytest.Config) -> None:
    """Without a path on the command line, `--benchmark` and `--quality` choose the suite."""
    chosen = [suite for option, suite in _SUITES.items() if config.getoption(option)]
    if chosen and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / suite) for suite in chosen]
    # pytest-benchmark opens its file when all is measured, and a folder that is not there would cost the run.
    if config.getoption("benchmark") and (file := config.getoption("benchmark_json", None)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A suite that takes minutes runs only when it is asked for."""
    for option, suite in _SUITES.items():
        if collection_path == config.rootpath / suite and not config.getoption(option):
            return True
    return None


@dataclass(slots=True)
class Bench:
    """What the session's experiment measured, and what the gate says of it."""

    results: Results
    header: Header
    title: str
    origins: list[str]
    baseline: RunFile | None
    judgements: list[Judgement]


_BENCH = pytest.StashKey[Bench]()
_QUALITY = pytest.StashKey[list[str]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.config.getoption("benchmark") or not {"arm", "judged"} & set(metafunc.fixturenames):
        return
    from specdecode.bench.presets import preset

    config = metafunc.config
    try:
        arms = dict.fromkeys(preset(config.getoption("preset")).arms)
        if "arm" in metafunc.fixturenames:
            metafunc.parametrize("arm", list(arms))
            return
        # The baseline's arms too: one that the run lacks must not pass in silence.
        if old := _baseline(config):
            arms |= dict.fromkeys(old.arms)
        judged = [(arm, gate) for arm in arms for gate in ("time", "counters")]
        metafunc.parametrize("judged", judged, ids=["-".join(pair) for pair in judged])
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> LM:
    """The target model of the command line."""
    return _load(request.config, request.config.getoption("target"))


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, target: LM) -> Results:
    """The experiment over the arms whose tests were selected, and the baseline."""
    config = request.config
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {values["arm"] if "arm" in values else values["judged"][0] for values in parameters}
    with ExitStack() as stack:
        if capture := config.pluginmanager.getplugin("capturemanager"):
            stack.enter_context(capture.global_and_fixture_disabled())
        config.stash[_BENCH] = bench = _measure(config, target, selected)
    return bench.results


@pytest.fixture(scope="session")
def judgements(request: pytest.FixtureRequest, results: Results) -> dict[tuple[str, str], Judgement]:
    """The gate's verdicts on this session's run, by arm and gate."""
    return {(judged.arm, judged.gate): judged for judged in request.config.stash[_BENCH].judgements}


@pytest.fixture(scope="session")
def quality_rows(request: pytest.FixtureRequest) -> list[str]:
    """Lines of results; they are shown when the session ends."""
    return request.config.stash.setdefault(_QUALITY, [])


def _identity(config: pytest.Config) -> Identity:
    """What makes runs comparable; known before a model is loaded."""
    from specdecode.bench.environment import hardware
    from specdecode.bench.runs import Identity
    from specdecode.loading import EMBEDDED, EMBEDDED_DRAFT, choose_device, choose_dtype

    option = config.getoption
    device = choose_device(option("device"))
    return Identity(
        hardware=hardware(device),
        target=option("target"),
        draft=option("draft") or (EMBEDDED_DRAFT if option("target") == EMBEDDED else ""),
        dtype=str(choose_dtype(option("dtype"), device)).removeprefix("torch."),
        preset=Path(option("preset")).stem,
    )


def _baseline(config: pytest.Config) -> RunFile | None:
    """The baseline to judge by, if there is one."""
    from specdecode.bench.runs import read

    given = config.getoption("baseline")
    path = Path(given) if given else config.rootpath / "baselines" / _identity(config).file
    return read(path) if given or path.exists() else None


def _load(config: pytest.Config, name: str, target: LM | None = None) -> LM:
    from specdecode.errors import SpecDecodeError
    from specdecode.loading import load

    try:
        return load(name, device=config.getoption("device"), dtype=config.getoption("dtype"), target=target)
    except (SpecDecodeError, ValueError) as error:
        pytest.exit(str(error), returncode=2)


def _measure(config: pytest.Config, target: LM, selected: set[str]) -> Bench:
    from specdecode.bench.arms import make
    from specdecode.bench.environment import environment
    from specdecode.bench.gate import judge
    from specdecode.bench.measure import experiment
    from specdecode.bench.names import BASELINE
    from specdecode.bench.presets import preset
    from specdecode.bench.progress import progress
    from specdecode.bench.runs import TOLERANCE, Header, run_file
    from specdecode.evals.data import token_prompts
    from specdecode.loading import weights_of

    option = config.getoption
    identity = _identity(config)
    chosen = preset(option("preset"))
    entries = {name: options for name, options in chosen.arms.items() if name in {BASELINE, *selected}}
    max_new_tokens = chosen.max_new_tokens if option("max_new_tokens") is None else option("max_new_tokens")
    draft = _load(config, identity.draft, target) if identity.draft else None
    try:
        prompts, origins = token_prompts(option("prompts") or chosen.prompts, target.encode)
        arms = [make(name, options, target, draft) for name, options in entries.items()]
        with progress() as tell:
            measured = experiment(target, arms, prompts, max_new_tokens, chosen.repeats, progress=tell)
    except ValueError as error:
        pytest.exit(str(error), returncode=2)
    versions = {**environment(), "weights": weights_of(identity.target)}
    header = Header(identity, max_new_tokens, list(prompts), measured.floor, versions)
    baseline = _baseline(config)
    judgements = []
    if baseline is not None:
        # Of the preset's arms only those that were selected; what the preset no longer has is missing all the same.
        concerned = {arm for arm in baseline.arms if arm not in chosen.arms} | set(entries)
        tolerance = TOLERANCE if option("tolerance") is None else option("tolerance")
        judgements = judge(run_file(header, measured), baseline, tolerance, concerned)
    title = (
        f"{target.name}{f' with {draft.name}' if draft else ''}, {identity.dtype} on {target.device},"
        f" {len(prompts)} prompts x {max_new_tokens} tokens"
    )
    return Bench(measured, header, title, origins, baseline, judgements)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(_QUALITY, []):
        terminalreporter.write_line(row)
    bench = config.stash.get(_BENCH, None)
    if bench is None:
        return
    from rich.console import Console

    from specdecode.bench.report import markdown, speed_table, verdict_table

    text = io.StringIO()
    console = Console(file=text, width=_TABLE_WIDTH, force_terminal=terminalreporter.hasmarkup)
    console.print(bench.title, highlight=False, soft_wrap=True)
    console.print(speed_table(bench.results))
    console.print(f"Prompts from {'; '.join(bench.origins)}.", highlight=False)
    if bench.baseline is None:
        told = (
            f"No baseline for this hardware: baselines/{bench.header.identity.file} is not there, so nothing was gated."
        )
        console.print(told, highlight=False, soft_wrap=True)
    else:
        told = f"Gate: against {bench.baseline.path}"
        console.print(told, highlight=False, soft_wrap=True)
        console.print(verdict_table(bench.judgements))
    terminalreporter.write_sep("=", "speed")
    terminalreporter.write(text.getvalue())
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as page:
            page.write(markdown(bench.results, bench.title, told, bench.judgements))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What pytest-benchmark does not record: the versions and the device that times depend on."""
    from specdecode.bench.environment import environment

    machine_info["specdecode"] = environment()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What makes pytest-benchmark's file one that the gate can judge."""
    bench = config.stash.get(_BENCH, None)
    if bench is not None:
        output_json["specdecode"] = bench.header.as_json()
