"""Every shape that the package declares is checked while it is tested."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jaxtyping
import pytest
import torch

from specdecode.bench.command_line import value_of

if find_spec("hypothesis"):  # not where only a suite is to run
    import tests.helpers.fuzzing  # noqa: F401  registers profiles, which pytest's option may name

# On a machine that was not set up for the tests they still tell something.
_CHECKED = find_spec("beartype") is not None
# Times, files and pages are tested here. Shapes are checked where the parts that compute them are tested.
_UNCHECKED = [Path(__file__).parent / folder for folder in ("bench", "cli")]


def pytest_report_header() -> str | None:
    return None if _CHECKED else "shapes are not checked, as beartype is not installed"


def pytest_configure(config: pytest.Config) -> None:
    """Before the first import of what is to be checked; the package's plugin, which comes earlier, brings none of it.

    pytest reads this file even if only another suite is to run. That one measures what users run: unchecked, and with
    all threads.
    """
    if value_of(config, "benchmark") or value_of(config, "quality"):
        return
    if _CHECKED:
        from tests.helpers import typecheck

        jaxtyping.jaxtyped = typecheck.some_calls  # what the hook puts on each function
        jaxtyping.install_import_hook("specdecode", f"{typecheck.__name__}.typechecker")

    from tests.helpers import models

    models.DEVICE = value_of(config, "device") or models.DEVICE
    # The models are so small that a second thread only costs.
    torch.set_num_threads(1)


_LONG = ("test_pretended.py", "test_gpu.py", "test_bisect.py", "test_installed.py", "test_suites.py", "test_servers.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest: one of them at the end would run alone, and the other workers wait."""
    items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Each timed call collects garbage before it, and would look through all that is imported by now."""
    if not (value_of(session.config, "benchmark") or value_of(session.config, "quality")):
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Check no shapes in folders where that takes time and finds nothing: in fixtures of modules neither.

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
    """What tells a process that it is one of several that share the tests would be told to the suites that tests start
    too, and they would measure nothing."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _nothing_beside() -> Iterator[None]:
    """Other tests run beside, and what they disturb would be measured again: as often as chance has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdecode.bench.measure.steady.watch", lambda *pids, device=None: lambda: 0.0)
        yield


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes unchecked, as a user runs the package: for the package's own checks, and where time counts."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
