"""The setup of all tests: every declared shape of the package is checked under test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch

from specdecode.bench.command_line import value_of

if find_spec("hypothesis"):  # it may be missing where only a suite is to run
    import tests.helpers.fuzzing  # noqa: F401  registers profiles for pytest's option

# Without beartype the tests still run, but check no shapes. The hook takes seconds even if checks are disabled.
_DISABLED = jaxtyping.config.jaxtyping_disable
_CHECKED = find_spec("beartype") is not None and not _DISABLED
# These folders test times, files and pages. Shapes are checked in the tests of the parts that compute them.
_UNCHECKED = [Path(__file__).parent / folder for folder in ("bench", "cli")]


def pytest_report_header() -> str | None:
    if _DISABLED:
        return "shapes are not checked, as JAXTYPING_DISABLE is set"
    return None if _CHECKED else "shapes are not checked, as beartype is not installed"


def pytest_configure(config: pytest.Config) -> None:
    """Install the shape checks before the first import of the package. The package's plugin, loaded earlier, imports no
    checked module.

    pytest reads this file even if only another suite is to run. That suite measures the package as users run it:
    unchecked, and with all threads.
    """
    if value_of(config, "benchmark") or value_of(config, "quality"):
        return
    if _CHECKED:
        from tests.helpers import typecheck

        jaxtyping.jaxtyped = typecheck.some_calls  # the decorator that the hook applies
        jaxtyping.install_import_hook("specdecode", f"{typecheck.__name__}.typechecker")

    from tests.helpers import models

    models.DEVICE = value_of(config, "device") or models.DEVICE
    # The models are so small that a second thread only costs time.
    torch.set_num_threads(1)


_LONG = (
    "test_pretended.py",
    "test_gpu.py",
    "test_bisect.py",
    "test_installed.py",
    "test_suites.py",
    "test_servers.py",
    "test_tensor_parallel.py",
    "test_examples.py",
    "test_training.py",
    "test_side_by_side.py",
    "test_embedded.py",
    "test_wrapped.py",
    "test_backends.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests: at the end, one of them would run alone while the other workers wait."""
    items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hide all imported objects from the garbage collector."""
    if not (value_of(session.config, "benchmark") or value_of(session.config, "quality")):
        _freeze()


@pytest.hookimpl(trylast=True)  # after the fixtures of the file have let go of their objects
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Hide the models and modules that the tests of a file left from the garbage collector."""
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Let the garbage collector search only objects that are made from here on. Each timed call collects garbage first;
    halfway through the tests, that would otherwise take half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Turn shape checks off in folders where they cost time and find nothing, also for fixtures of modules.

    Elsewhere each test counts anew which calls are checked.
    """
    if _CHECKED:
        from tests.helpers import typecheck

        typecheck.calls.clear()
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or any(item.path.is_relative_to(part) for part in _UNCHECKED))
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session", autouse=True)
def _no_worker_to_its_children() -> None:
    """Remove the variables of pytest-xdist: a suite started by a test would take itself for a worker and measure
    nothing.
    """
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _nothing_beside() -> Iterator[None]:
    """Ignore other work on the machine: parallel tests would trigger repeats of measurements, at random. Keep the
    reads small that measure its bandwidth: no test depends on that figure. Let experiments leave hidden from the
    garbage collector what `_freeze` hides.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdecode.bench.measure.bandwidth._READ_BYTES", 2**20)
        patch.setattr("specdecode.bench.measure.steady.watch", lambda *pids, device=None: lambda: 0.0)
        patch.setattr("specdecode.bench.measure.block.gc", SimpleNamespace(unfreeze=lambda: None))
        yield


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn shape checks off, as for users: for the package's own checks, and where time counts."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
