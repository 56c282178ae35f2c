"""The CUDA path, in a process that pretends to have a GPU: `tox -e pretend` runs more of the tests there."""

from __future__ import annotations

from tests.helpers.suites import run_pytest


def test_the_cuda_path() -> None:
    """Guards against what fails on a GPU alone: tensors of two devices in one operation, copies that have not arrived,
    results that another graph has overwritten, captures and waits where there need be none."""
    pretended = ("-p", "tests.helpers.pretended", "--device=cuda:0", "-W", "default")
    # Shapes are checked where the same code runs on a CPU.
    done = run_pytest(*pretended, "tests/backends/test_cuda.py", alone=True, JAXTYPING_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout
