"""pytest with the package's suites, run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from tests.helpers.root import ROOT

# Where the package is installed, pytest finds the plugin by itself, and takes no second one.
_INSTALLED = any(entry.name == "specdecode" for entry in entry_points(group="pytest11"))
ELSEWHERE = ("--benchmark",) if _INSTALLED else ("-p", "specdecode.bench.plugin", "--benchmark")
"""Arguments that start the speed suite in a folder that is not this repository's."""


def run_pytest(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    if "--benchmark" in arguments:  # other tests run beside, and each session would take twice as long
        command.append("--specdecode-again=0")
    # The model is so small that a second thread only costs.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


_IN_TURN = """
import contextlib, io, json, os, sys
import pytest, torch, transformers
import specdecode.bench.measure.speed_session, specdecode.bench.report.html
for arguments in json.loads(sys.argv[1]):
    ours, theirs = os.pipe()
    if os.fork() == 0:
        try:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = pytest.main([*json.loads(sys.argv[2]), *arguments])
            os.write(theirs, json.dumps([code, said.getvalue()]).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        print(answer.read())
    os.wait()
"""


def run_pytest_in_turn(*commands: Sequence[str], cwd: Path = ROOT) -> list[tuple[int, str]]:
    """Return the exit code and the output of several sessions, forked from one process that imports PyTorch once."""
    # PyTorch brings modules that pytest would rewrite.
    quietly = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    done = subprocess.run(
        [sys.executable, "-c", _IN_TURN, json.dumps(commands), json.dumps(quietly)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [(code, said) for code, said in map(json.loads, done.stdout.splitlines())]
