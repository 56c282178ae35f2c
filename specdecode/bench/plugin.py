"""The pytest plugin: `--benchmark` measures every arm of a preset, and replays the times through pytest-benchmark.

Importing it is cheap: torch and the models are loaded when the first benchmark starts.
"""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from specdecode.bench.measure import Results
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


def pytest_configure(config: pytest.Config) -> None:
    """Without a path on the command line, `--benchmark` and `--quality` choose the suite."""
    chosen = [suite for option, suite in _SUITES.items() if config.getoption(option)]
    if chosen and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / suite) for suite in chosen]


def pytest_ignore_collect(collection_path: Any, config: pytest.Config) -> bool | None:
    """A suite that takes minutes runs only when it is asked for."""
    for option, suite in _SUITES.items():
        if collection_path == config.rootpath / suite and not config.getoption(option):
            return True
    return None


@dataclass(slots=True)
class Bench:
    """What the session's experiment measured."""

    results: Results
    title: str
    origins: list[str]


_BENCH = pytest.StashKey[Bench]()
_QUALITY = pytest.StashKey[list[str]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arm" in metafunc.fixturenames:
        from specdecode.bench.presets import preset

        try:
            arms = list(preset(metafunc.config.getoption("preset")).arms)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        metafunc.parametrize("arm", arms)


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> LM:
    """The target model of the command line."""
    return _load(request.config, request.config.getoption("target"))


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, target: LM) -> Results:
    """The experiment over the arms whose tests were selected, and the baseline."""
    config = request.config
    selected = {item.callspec.params["arm"] for item in request.session.items if hasattr(item, "callspec")}
    with ExitStack() as stack:
        if capture := config.pluginmanager.getplugin("capturemanager"):
            stack.enter_context(capture.global_and_fixture_disabled())
        config.stash[_BENCH] = bench = _measure(config, target, selected)
    return bench.results


@pytest.fixture(scope="session")
def quality_rows(request: pytest.FixtureRequest) -> list[str]:
    """Lines of results; they are shown when the session ends."""
    return request.config.stash.setdefault(_QUALITY, [])


def _load(config: pytest.Config, name: str, target: LM | None = None) -> LM:
    import transformers

    from specdecode.errors import SpecDecodeError
    from specdecode.loading import load

    transformers.logging.set_verbosity_error()
    try:
        return load(name, device=config.getoption("device"), dtype=config.getoption("dtype"), target=target)
    except (SpecDecodeError, ValueError) as error:
        pytest.exit(str(error), returncode=2)


def _measure(config: pytest.Config, target: LM, selected: set[str]) -> Bench:
    from specdecode.bench.arms import BASELINE, make
    from specdecode.bench.measure import experiment
    from specdecode.bench.presets import preset
    from specdecode.bench.progress import progress
    from specdecode.evals.data import token_prompts
    from specdecode.loading import EMBEDDED, EMBEDDED_DRAFT

    option = config.getoption
    chosen = preset(option("preset"))
    entries = {name: options for name, options in chosen.arms.items() if name in {BASELINE, *selected}}
    max_new_tokens = chosen.max_new_tokens if option("max_new_tokens") is None else option("max_new_tokens")
    draft_name = option("draft") or (EMBEDDED_DRAFT if option("target") == EMBEDDED else None)
    draft = _load(config, draft_name, target) if draft_name else None
    try:
        prompts, origins = token_prompts(option("prompts") or chosen.prompts, target.encode)
        arms = [make(name, options, target, draft) for name, options in entries.items()]
        with progress() as tell:
            measured = experiment(target, arms, prompts, max_new_tokens, chosen.repeats, progress=tell)
    except ValueError as error:
        pytest.exit(str(error), returncode=2)
    pair = target.name if draft is None else f"{target.name} with {draft.name}"
    title = (
        f"{pair}, {str(target.dtype).removeprefix('torch.')} on {target.device},"
        f" {len(prompts)} prompts x {max_new_tokens} tokens"
    )
    return Bench(measured, title, origins)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(_QUALITY, []):
        terminalreporter.write_line(row)
    bench = config.stash.get(_BENCH, None)
    if bench is None:
        return
    from rich.console import Console

    from specdecode.bench.report import speed_table

    text = io.StringIO()
    console = Console(file=text, width=_TABLE_WIDTH, force_terminal=terminalreporter.hasmarkup)
    console.print(bench.title, highlight=False, soft_wrap=True)
    console.print(speed_table(bench.results))
    console.print(f"Prompts from {'; '.join(bench.origins)}.", highlight=False)
    terminalreporter.write_sep("=", "speed")
    terminalreporter.write(text.getvalue())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What pytest-benchmark does not record: the versions and the device that times depend on."""
    from specdecode.bench.environment import environment

    machine_info["specdecode"] = environment()
