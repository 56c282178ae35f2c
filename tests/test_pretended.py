"""The CUDA path, in a process with a pretended GPU. `tox -e pretend` runs more of the tests there."""

from __future__ import annotations

import pytest

from tests.helpers.suites import run_pytest


@pytest.mark.parametrize("file", ["backends/test_cuda.py", "models/test_device_map.py"])
def test_the_cuda_path(file: str) -> None:
    """Guards against faults that only GPUs show: tensors of two devices in one operation, copies that have not arrived,
    results that another graph has overwritten, and needless captures and waits.
    """
    pretended = ("-p", "tests.helpers.pretended", "--device=cuda:0", "-W", "default")
    # The tests on a CPU check the shapes of the same code.
    done = run_pytest(*pretended, f"tests/{file}", alone=True, JAXTYPING_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout
