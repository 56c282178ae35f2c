"""Users' repositories with the package installed: runs of pytest in folders of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Protocol

from tests.helpers.root import ROOT
from tests.helpers.suites import run_pytest


class Runs(Protocol):
    def __call__(self, *arguments: str, alone: bool = False, **environment: str) -> CompletedProcess[str]: ...


def runs_in(folder: Path, packages: Path) -> Runs:
    """Return a function that runs pytest in a folder, with the package and the packages in the folder's `src`
    installed.

    Args:
        folder: the repository's folder.
        packages: an empty folder for the metadata of the installed plugin.
    """
    metadata = packages / "specdecode_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: specdecode-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\nspecdecode = specdecode.bench.plugin\n")
    path = os.pathsep.join(map(str, (packages, ROOT, folder / "src")))

    def run(*arguments: str, alone: bool = False, **environment: str) -> CompletedProcess[str]:
        return run_pytest(*arguments, cwd=folder, alone=alone, PYTHONPATH=path, HF_HUB_OFFLINE="1", **environment)

    return run


def commit(folder: Path) -> None:
    """Commit all files of a folder. Make the folder a repository first if it is not one."""
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "a commit")):
        subprocess.run(["git", "-c", "user.name=N", "-c", "user.email=n@e", *command], cwd=folder, check=True)
