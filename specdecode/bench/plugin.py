"""The pytest plugin: `--benchmark` measures every arm of a preset, and replays the times through pytest-benchmark.

Importing it is cheap: torch and the models are loaded when the first benchmark is collected.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from specdecode.bench.measure.session import Bench
    from specdecode.bench.options import Options
    from specdecode.bench.quality.session import Quality
    from specdecode.models.lm import LM

_TABLE_WIDTH = 145
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
    group.addoption(
        "--backend",
        default="auto",
        help="how our forwards run: eager, packed, compile, graph or auto, the fastest here [auto]",
    )
    group.addoption("--max-new-tokens", type=int, default=None, help="length of every output [as the preset says]")
    group.addoption(
        "--prompts",
        default=None,
        help="data sets as NAME[/CATEGORY][@TOKENS][:COUNT]: humaneval:4,spec-bench:13,spec-bench/qa:2,prose@20:all"
        " [as the preset says]",
    )
    group.addoption(
        "--eos",
        action="store_true",
        help="end outputs at the target's stop tokens [off: every output has the asked length]",
    )
    group.addoption(
        "--tiny",
        action="store_true",
        help="rehearse the preset in seconds: the smallest models, texts and caches",
    )
    group.addoption("--repeats", type=int, default=None, help="blocks for each prompt [as the preset says]")
    group.addoption("--resume", action="store_true", help="go on with the blocks that an interrupted run finished")
    group.addoption(
        "--gate",
        default="on",
        choices=["on", "off", "strict"],
        help="fail on REGRESSED and MISSING, on nothing, or on all but PASS and IMPROVED [on]",
    )
    group.addoption(
        "--tolerance", type=float, default=None, help="share by which a time may be worse [0.05; 0.02 with --against]"
    )
    group.addoption("--baseline", default=None, help="run file to judge by [the one for this hardware in baselines/]")
    group.addoption(
        "--against", default=None, help="measure the working tree and this commit side by side, and judge by that"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Without a path on the command line, `--benchmark` and `--quality` choose the suite."""
    chosen = [suite for option, suite in _SUITES.items() if config.getoption(option)]
    if chosen and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / suite) for suite in chosen]
    # pytest-benchmark opens its file when all is measured, and a folder that is not there would cost the run.
    if config.getoption("benchmark") and (file := config.getoption("benchmark_json", None)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = _Unfinished(file)


class _Unfinished(type(Path())):  # type: ignore[misc]
    """A path that is written under another name until it is whole."""

    def __fspath__(self) -> str:
        return f"{self}.tmp"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Once pytest-benchmark has written its file, it gets its name, and the finished blocks are no longer needed."""
    yield
    config = session.config
    if _BENCH in config.stash:
        file = config.getoption("benchmark_json", None)
        if file and os.path.exists(file):
            os.replace(file, str(file))
        _options(config).journal.unlink(missing_ok=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A suite that takes minutes runs only when it is asked for."""
    for option, suite in _SUITES.items():
        if collection_path == config.rootpath / suite and not config.getoption(option):
            return True
    return None


_BENCH = pytest.StashKey["Bench"]()
_QUALITY = pytest.StashKey["Quality"]()
_ROWS = pytest.StashKey[list[str]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("quality") and "cost" in metafunc.fixturenames:
        from specdecode.bench.quality.session import chosen_preset
        from specdecode.evals.results import MEASURES

        with _one_sentence():
            preset = chosen_preset(_options(metafunc.config))
        costs = [(arm, measure) for arm in preset.arms for measure in MEASURES]
        if preset.tasks is not None:
            costs += product(preset.tasks.arms, preset.tasks.problems)
        metafunc.parametrize("cost", costs, ids=["-".join(pair) for pair in costs])
    if not metafunc.config.getoption("benchmark") or not {"arm", "judged"} & set(metafunc.fixturenames):
        return
    options = _options(metafunc.config)
    with _one_sentence():
        if "arm" in metafunc.fixturenames:
            metafunc.parametrize("arm", list(options.experiment.arms))
            return
        judged = [(arm, gate) for arm in options.known_arms for gate in ("time", "counters")]
        metafunc.parametrize("judged", judged, ids=["-".join(pair) for pair in judged])


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> LM:
    """The target model of the command line, on its backend."""
    with _one_sentence():
        options = _options(request.config)
        return options.load(options.identity.target).with_backend(options.backend)


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    """What was measured of the arms whose tests were selected, and the verdicts on it."""
    from specdecode.bench.measure.session import measure

    config = request.config
    parameters = _parameters(request)
    selected = {values["arm"] if "arm" in values else values["judged"][0] for values in parameters}
    with _at_work(config):
        config.stash[_BENCH] = measure(_options(config), selected)
    return config.stash[_BENCH]


@pytest.fixture(scope="session")
def quality(request: pytest.FixtureRequest) -> Quality:
    """What was judged of the arms whose tests were selected, and what their margins say of it."""
    from specdecode.bench.quality.session import measure

    config = request.config
    selected = {values["cost"][0] for values in _parameters(request) if "cost" in values}
    with _at_work(config):
        config.stash[_QUALITY] = measure(_options(config), selected)
    return config.stash[_QUALITY]


def _parameters(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Those of the tests that were selected."""
    return [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]


@contextmanager
def _at_work(config: pytest.Config) -> Iterator[None]:
    """For minutes of work within a fixture: its progress is seen, and what stops it is told in a sentence."""
    with ExitStack() as stack:
        if capture := config.pluginmanager.getplugin("capturemanager"):
            stack.enter_context(capture.global_and_fixture_disabled())
        try:
            with _one_sentence():
                yield
        except KeyboardInterrupt:
            sys.stderr.write("\nInterrupted. The same command with --resume goes on with what is finished.\n")
            raise


@pytest.fixture(scope="session")
def quality_rows(request: pytest.FixtureRequest) -> list[str]:
    """Lines of results; they are shown when the session ends."""
    return request.config.stash.setdefault(_ROWS, [])


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What is wrong with the input ends the session with one sentence, and exit code 2."""
    from specdecode.core.errors import SpecDecodeError

    try:
        yield
    except (SpecDecodeError, ValueError) as error:
        pytest.exit(str(error), returncode=2)


def _options(config: pytest.Config) -> Options:
    from specdecode.bench.options import Options

    return Options(root=config.rootpath, **{field.name: config.getoption(field.name) for field in fields(Options)[1:]})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(_ROWS, []):
        terminalreporter.write_line(row)
    if (judged := config.stash.get(_QUALITY, None)) is not None:
        _tell_quality(terminalreporter, judged)
    bench = config.stash.get(_BENCH, None)
    if bench is None:
        return
    from rich.console import Console

    from specdecode.bench.report.markdown import markdown
    from specdecode.bench.report.tables import speed_table, verdict_table

    text = io.StringIO()
    console = Console(file=text, width=_TABLE_WIDTH, force_terminal=terminalreporter.hasmarkup)
    console.print(bench.title, highlight=False, soft_wrap=True)
    console.print(speed_table(bench.run))
    console.print(f"Prompts from {'; '.join(bench.origins)}.", highlight=False)
    console.print(bench.judged_by, highlight=False, soft_wrap=True)
    if bench.judgements:
        console.print(verdict_table(bench.judgements))
    terminalreporter.write_sep("=", "speed")
    terminalreporter.write(text.getvalue())
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as page:
            page.write(markdown(bench.run, bench.title, bench.judged_by, bench.judgements))


def _tell_quality(terminalreporter: pytest.TerminalReporter, judged: Quality) -> None:
    from rich.console import Console

    from specdecode.bench.quality.tables import costs, markdown, notes, retrieval, scores
    from specdecode.bench.report.grid import rich_table
    from specdecode.support.files import write_whole

    text = io.StringIO()
    console = Console(file=text, width=_TABLE_WIDTH, force_terminal=terminalreporter.hasmarkup)
    console.print(rich_table(costs(judged.run, judged.judgements)))
    if judged.run.needles:
        console.print(rich_table(retrieval(judged.run)))
    if judged.run.answers:
        console.print(rich_table(scores(judged.run, judged.judgements)))
    page = markdown(judged.run, judged.judgements)
    write_whole(judged.file.with_suffix(".md"), page)
    where = f"The run is in {judged.file}, a page of it in the .md beside it; margins are taken from {judged.margins}."
    try:
        from specdecode.bench.quality.figures import write as draw

        folder = judged.file.with_suffix("")
        drawn = [name for name, reason in draw(judged.run, folder).items() if not reason]
        where += f" Figures are in {folder}: {', '.join(drawn)}."
    except ImportError as error:
        where += f" There are no figures: they need matplotlib ({error}), pip install 'specdecode[figures]'."
    for note in [*notes(judged.run), where]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    terminalreporter.write_sep("=", "quality")
    terminalreporter.write(text.getvalue())
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as told:
            told.write(page)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What pytest-benchmark does not record: the versions and the device that times depend on."""
    from specdecode.support.environment import environment

    machine_info["specdecode"] = environment()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What makes pytest-benchmark's file one that the gate can judge."""
    from specdecode.bench.runs.file import run_json

    bench = config.stash.get(_BENCH, None)
    if bench is not None:
        output_json["specdecode"] = run_json(bench.run)
