"""The CUDA path, in a process with a pretended GPU. `tox -e pretend` runs more of the tests there."""

from __future__ import annotations

from tests.helpers.heads import HAS_MTP
from tests.helpers.suites import run_pytest


def test_the_cuda_path() -> None:
    """Guards against faults that only GPUs show: tensors of two devices in one operation, copies that have not arrived,
    results that another graph has overwritten, and needless captures and waits.
    """
    pretended = ("-p", "tests.helpers.pretended", "--device=cuda:0", "-W", "default")
    # The tests on a CPU check the shapes of the same code.
    files = ("tests/backends/test_cuda.py", "tests/models/test_device_map.py")
    left_out = () if HAS_MTP else ("-k", "not mtp")
    done = run_pytest(*pretended, *files, *left_out, alone=True, JAXTYPING_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout
