"""The pytest plugin: `--benchmark` measures every arm of a preset, and replays the times through pytest-benchmark.

Without `--benchmark` or `--quality` it measures nothing. Importing it is cheap: torch is imported when a suite is
collected, and a model is loaded when the first test of a suite runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from specdecode.bench.command_line import (
    PREFIX,
    add_options,
    check_processes,
    check_pytest_benchmark,
    options_of,
    value_of,
)
from specdecode.support.files import check_writable, is_device, writing
from specdecode.support.memory_pages import ask_for_large_pages
from specdecode.support.torchrun import rank

if TYPE_CHECKING:
    from specdecode.bench.measure.speed_session import JudgedRun
    from specdecode.bench.pair import Pair
    from specdecode.bench.plan import Plan, Setup
    from specdecode.bench.quality.plan import QualityPlan
    from specdecode.bench.quality.quality_session import JudgedQualityRun
    from specdecode.models.lm import LM


def _suite_folder(suite: str) -> Path:
    """Return the folder of a suite: in an installed package, or in the checkout that contains the package."""
    package = Path(str(files("specdecode")))
    installed = package / "suites" / suite
    return installed if installed.is_dir() else package.parent / suite


_ENTRY_POINT = "specdecode"
"""Name of this plugin if it is installed. Pytest then loads it before the plugins of conftest.py files."""

_SUITES = {"benchmark": _suite_folder("perf"), "quality": _suite_folder("quality")}
"""Folders of the suites, by the option that runs each."""

_PAGE = "GITHUB_STEP_SUMMARY"  # variable: the file for the summary of a job on GitHub

_SETUP: pytest.StashKey[Setup] = pytest.StashKey()
_PLAN: pytest.StashKey[Plan] = pytest.StashKey()
_QUALITY_PLAN: pytest.StashKey[QualityPlan] = pytest.StashKey()
_SPEED_RUN: pytest.StashKey[JudgedRun] = pytest.StashKey()
_QUALITY_RUN: pytest.StashKey[JudgedQualityRun] = pytest.StashKey()
_ROWS: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options, if a conftest.py loads this plugin. All other plugins have then added their options."""
    if not pluginmanager.has_plugin(_ENTRY_POINT):
        add_options(parser)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Iterator[None]:
    """Add the options after those of all other plugins and conftest.py files, if this plugin is installed.

    With `--tp` only the first process reports. The others are silenced here, because pytest captures output later.
    """
    if rank() and any(argument.startswith(("--tp", f"--{PREFIX}tp")) for argument in args):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    yield
    if early_config.pluginmanager.has_plugin(_ENTRY_POINT):
        add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the suites by `--benchmark` and `--quality`. Reject options that would measure nothing or lose the run.

    This hook runs before those of other plugins, because pytest-xdist would start its processes.
    """
    chosen = [suite for option, suite in _SUITES.items() if value_of(config, option)]
    if not chosen:
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = list(map(str, chosen))
    ask_for_large_pages()
    if rank() and value_of(config, "tp"):
        _write_no_files(config)
    with _one_sentence():
        options_of(config)
        check_processes(config)
        # Files are opened after the measurement. A file that cannot be written would then lose the run.
        if value_of(config, "benchmark"):
            check_pytest_benchmark(config)
            _check_json(config)
        if page := os.environ.get(_PAGE):
            check_writable(Path(page))


def _write_no_files(config: pytest.Config) -> None:
    """Write no files in this process: the first of the processes that decode together writes them."""
    os.environ.pop(_PAGE, None)
    for option in ("benchmark_json", "benchmark_save", "benchmark_autosave", "xmlpath"):
        if hasattr(config.option, option):
            setattr(config.option, option, None)


def _check_json(config: pytest.Config) -> None:
    """Let pytest-benchmark write its file under a temporary name. Raise ValueError if it cannot be written."""
    if option := config.getoption("benchmark_json", None):
        file = Path(option if isinstance(option, os.PathLike) else option.name)
        check_writable(file)
        if not is_device(file):
            config.option.benchmark_json = _Unfinished(os.path.realpath(file))


class _Unfinished(type(Path())):  # type: ignore[misc]
    """A path with a temporary name until the file is complete."""

    @property
    def so_far(self) -> Path:
        """The path of a run file with the finished blocks, until the run is complete."""
        return Path(str(self)).with_suffix(".unfinished.json")

    def __fspath__(self) -> str:
        return f"{self}.{os.getpid()}.tmp"

    # pytest-benchmark 5.2 writes into an open file, 5.3 opens a path.
    def __enter__(self) -> BinaryIO:
        self._file = open(self, "wb")
        return self._file

    def __exit__(self, *exception: object) -> None:
        self._file.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Rename pytest-benchmark's complete file to its own name, and delete the journal if all files are written."""
    config = session.config
    file = config.getoption("benchmark_json", None)
    if isinstance(file, _Unfinished) and _SPEED_RUN in config.stash:
        saver = config._benchmarksession  # type: ignore[attr-defined]
        saver.json = saver.json if saver.benchmarks else None  # or it warns that it saves nothing: `_write_run` does
    try:
        yield
    except OSError as error:
        if isinstance(file, _Unfinished):
            Path(os.fspath(file)).unlink(missing_ok=True)
        if _SPEED_RUN not in config.stash:
            raise
        reason = f"{error.filename or file} cannot be written: {error.strerror}"
        pytest.exit(f"{reason}; {_how_to_go_on(config)}", returncode=2)
    if isinstance(file, _Unfinished):
        if os.path.exists(file):
            os.replace(file, str(file))
            file.so_far.unlink(missing_ok=True)
        elif _SPEED_RUN in config.stash:
            _write_run(config, file)
    if _SPEED_RUN in config.stash and (journal := config.stash[_SPEED_RUN].journal) is not None:
        journal.finish()


def _write_run(config: pytest.Config, file: _Unfinished) -> None:
    """Write a run without benchmarks, as of `-k counters`: pytest-benchmark then writes no file."""
    from specdecode.bench.runs.file import write_run

    try:
        write_run(replace(config.stash[_SPEED_RUN].run, path=Path(str(file))))
    except ValueError as error:
        pytest.exit(f"{error}; {_how_to_go_on(config)}", returncode=2)
    file.so_far.unlink(missing_ok=True)


def _how_to_go_on(config: pytest.Config) -> str:
    """Return what the same command does after an interruption."""
    anew = value_of(config, "against")
    return f"the same command {'measures both versions anew' if anew else 'with --resume keeps what was measured'}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a suite without its option, because it takes minutes."""
    return any(collection_path == suite and not value_of(config, option) for option, suite in _SUITES.items()) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Resolve the plans of the suites to be collected, so that a wrong option ends the session before collection."""
    config = session.config
    for option, resolve_plan in (("benchmark", _plan), ("quality", _quality_plan)):
        if value_of(config, option) and _is_collected(config, _SUITES[option]):
            resolve_plan(config)


def _is_collected(config: pytest.Config, suite: Path) -> bool:
    """Return whether the arguments name a suite, a part of it, or a folder above it."""
    paths = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    return any(suite.is_relative_to(path) or path.is_relative_to(suite) for path in paths)


def _setup(config: pytest.Config) -> Setup:
    """Return the suites' models and device. The first call resolves them."""
    if _SETUP not in config.stash:
        from specdecode.bench.plan import resolve_setup

        with _one_sentence():
            config.stash[_SETUP] = resolve_setup(options_of(config))
    return config.stash[_SETUP]


def _plan(config: pytest.Config) -> Plan:
    """Return the plan of the speed session. The first call resolves it, because other tests need no plan."""
    if _PLAN not in config.stash:
        from specdecode.bench.plan import resolve

        setup = _setup(config)
        with _one_sentence():
            config.stash[_PLAN] = plan = resolve(options_of(config), setup)
            if plan.against is None:
                check_writable(plan.journal)
    return config.stash[_PLAN]


def _quality_plan(config: pytest.Config) -> QualityPlan:
    """Return the plan of the quality session. The first call resolves it."""
    if _QUALITY_PLAN not in config.stash:
        from specdecode.bench.quality.plan import resolve_quality

        setup = _setup(config)
        with _one_sentence():
            config.stash[_QUALITY_PLAN] = plan = resolve_quality(options_of(config), setup)
            for file in (plan.file, plan.journal):
                check_writable(file)
    return config.stash[_QUALITY_PLAN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create a test for each arm, verdict and cost of the plans."""
    config, wanted = metafunc.config, set(metafunc.fixturenames)
    if value_of(config, "quality") and {"cost", "quality_run"} <= wanted:
        from specdecode.evals.results import MEASURES

        preset = _quality_plan(config).preset
        costs = [(arm, measure) for arm in preset.arms for measure in MEASURES]
        if preset.tasks is not None:
            costs += product(preset.tasks.arms, preset.tasks.problems)
        metafunc.parametrize("cost", costs, ids=["-".join(pair) for pair in costs])
    if value_of(config, "benchmark") and {"arm", "speed_run"} <= wanted:
        metafunc.parametrize("arm", list(_plan(config).preset.arms))
    elif value_of(config, "benchmark") and {"judged", "speed_run"} <= wanted:
        judged = [(arm, gate) for arm in _plan(config).judged_arms for gate in ("time", "counters")]
        metafunc.parametrize("judged", judged, ids=["-".join(pair) for pair in judged])


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    """The plan of the speed session."""
    return _plan(request.config)


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> LM:
    """The target model of the command line, on its backend."""
    setup = _setup(request.config)
    with _one_sentence():
        return setup.load_target().with_backend(setup.backend)


@pytest.fixture(scope="session")
def speed_run(request: pytest.FixtureRequest) -> JudgedRun:
    """The run of the arms of the selected tests, with the gate's judgements."""
    from specdecode.bench.measure.speed_session import measure

    config, plan = request.config, _plan(request.config)
    selected = {values["arm"] if "arm" in values else values["judged"][0] for values in _parameters(request)}
    file = config.getoption("benchmark_json", None)
    with _at_work(config):
        if plan.against is None and not plan.resume:
            _note_interrupted(plan.journal, "blocks")
        config.stash[_SPEED_RUN] = measure(plan, selected, file=file.so_far if isinstance(file, _Unfinished) else None)
    return config.stash[_SPEED_RUN]


@pytest.fixture(scope="session")
def quality_run(request: pytest.FixtureRequest) -> JudgedQualityRun:
    """The run of the arms of the selected tests, with the checks of their margins."""
    from specdecode.bench.quality.quality_session import measure

    config, plan = request.config, _quality_plan(request.config)
    selected = {values["cost"][0] for values in _parameters(request) if "cost" in values}
    with _at_work(config):
        if not plan.resume:
            _note_interrupted(plan.journal, "pieces")
        config.stash[_QUALITY_RUN] = measure(plan, selected)
    return config.stash[_QUALITY_RUN]


def _parameters(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return the parameters of the selected tests that use a fixture, which is the one of this request."""
    return [
        item.callspec.params
        for item in request.session.items
        if hasattr(item, "callspec") and request.fixturename in getattr(item, "fixturenames", ())
    ]


def _note_interrupted(journal: Path, unit: str) -> None:
    """Write a line if an interrupted run left finished blocks or pieces, which a run without --resume discards.

    It is written before the models are loaded, so that a user can still stop and keep them.
    """
    from specdecode.bench.measure.journal import finished_pieces
    from specdecode.support.messages import note

    if finished := finished_pieces(journal):
        note(
            f"\n{journal} keeps an interrupted run (finished {unit}: {finished}). This run starts anew. To go on with"
            " the other one, stop now and add --resume."
        )


@contextmanager
def _at_work(config: pytest.Config) -> Iterator[None]:
    """Let a fixture run for minutes: show its progress, and report an error or an interruption in one sentence."""
    with ExitStack() as stack:
        if capture := config.pluginmanager.getplugin("capturemanager"):
            stack.enter_context(capture.global_and_fixture_disabled())
        try:
            with _one_sentence():
                yield
        except KeyboardInterrupt:
            sys.stderr.write(f"\nInterrupted: {_how_to_go_on(config)}.\n")
            raise


@pytest.fixture
def paired(request: pytest.FixtureRequest) -> Pair:
    """Compare two functions: `paired(new=..., old=...)`, timed with `--benchmark`. See `bench.pair.Pair`."""
    from specdecode.bench.pair import Pair

    return Pair(request, options_of(request.config) if value_of(request.config, "benchmark") else None)


@pytest.fixture(scope="session")
def quality_rows(request: pytest.FixtureRequest) -> list[str]:
    """Lines of results, shown at the end of the session."""
    return request.config.stash.setdefault(_ROWS, [])


@contextmanager
def _one_sentence() -> Iterator[None]:
    """End the session with one sentence and exit code 2 if an input is wrong, or the GPU is too small."""
    from specdecode.core.errors import NO_GPU_MEMORY, SpecDecodeError, is_out_of_memory

    try:
        yield
    except (SpecDecodeError, ValueError) as error:
        pytest.exit(str(error), returncode=2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        pytest.exit(NO_GPU_MEMORY, returncode=2)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the tables of the session's results, and add comments to the summary of a job on GitHub."""
    encoding = sys.stdout.encoding or "utf-8"
    for row in config.stash.get(_ROWS, []):
        terminalreporter.write_line(row)
    if "specdecode.bench.pair" in sys.modules:
        from specdecode.bench.pair import judged_pairs, pairs_comment, pairs_text

        if pairs := judged_pairs(config):
            text = pairs_text(pairs, terminalreporter.hasmarkup, encoding)
            _show(terminalreporter, "paired", text, partial(pairs_comment, pairs))
    if (quality_run := config.stash.get(_QUALITY_RUN, None)) is not None:
        from specdecode.bench.summary import quality_comment, quality_text

        text = quality_text(quality_run, terminalreporter.hasmarkup, encoding)
        _show(terminalreporter, "quality", text, partial(quality_comment, quality_run))
    if (speed_run := config.stash.get(_SPEED_RUN, None)) is not None:
        from specdecode.bench.summary import speed_comment, speed_text

        text = speed_text(speed_run, terminalreporter.hasmarkup, encoding)
        file = str(config.getoption("benchmark_json", None) or "")
        _show(terminalreporter, "speed", text, partial(speed_comment, speed_run, config.stash[_PLAN].gate, file))


def _show(terminalreporter: pytest.TerminalReporter, title: str, text: str, make_comment: Callable[[], str]) -> None:
    terminalreporter.write_sep("=", title)
    terminalreporter.write(text)
    try:
        comment = make_comment()
        if file := os.environ.get(_PAGE):
            with writing(Path(file)), Path(file).open("a", encoding="utf-8") as summary:
                summary.write(comment)
    except ValueError as error:
        # Without the summary no result is lost, as the run has a file of its own.
        terminalreporter.write_line(f"specdecode: {error}", red=True)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add the versions and the device to pytest-benchmark's file. Times depend on them, and it does not record them."""
    if _PLAN not in config.stash:  # other benchmarks need not depend on PyTorch
        return
    from specdecode.support.environment import environment

    machine_info["specdecode"] = environment()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the run to pytest-benchmark's file, for the gate."""
    from specdecode.bench.runs.file import run_json

    if (speed_run := config.stash.get(_SPEED_RUN, None)) is not None:
        output_json["specdecode"] = run_json(speed_run.run)
