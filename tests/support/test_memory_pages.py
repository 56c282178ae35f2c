import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdecode.support.memory_pages import LARGE_PAGES
from tests.helpers.root import ROOT

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Linux names all choices here, and the present one in brackets."""

SHOW_LARGE_PAGES = """
from specdecode import cli

def app():
    import torch
    weights = torch.ones(2**24)
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("AnonHugePages"):
            print(int(line.split()[1]) // 1024)

cli.app = app
cli.main()
"""


def large_mib(**environment: str) -> int:
    """Return the MiB of large pages in a process of the command line that holds 64 MiB of weights."""
    own = {name: value for name, value in os.environ.items() if name != LARGE_PAGES} | environment
    command = [sys.executable, "-c", SHOW_LARGE_PAGES]
    return int(subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(
    not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="programs cannot ask for large pages here"
)
def test_weights_lie_in_large_pages_unless_the_user_says_no() -> None:
    assert large_mib() >= 32
    assert large_mib(**{LARGE_PAGES: "0"}) < 32
