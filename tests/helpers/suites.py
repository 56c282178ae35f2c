"""Runs of the package's suites under pytest, in processes of their own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from tests.helpers.root import ROOT

# Where the package is installed, pytest finds the plugin by itself and refuses a second one.
_INSTALLED = any(entry.name == "specdecode" for entry in entry_points(group="pytest11"))
ELSEWHERE = ("--benchmark",) if _INSTALLED else ("-p", "specdecode.bench.plugin", "--benchmark")
"""Arguments that start the speed suite in a folder that is not this repository's."""


_SERVER = """
import json, os, sys
import pytest, torch, transformers
import specdecode.bench.measure.speed_session, specdecode.bench.report.html
for line in sys.stdin:
    arguments, folder, variables, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for stream, file in zip((0, 1, 2), (os.devnull, *files)):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(variables)
            sys.path[1:1] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(encoding=variables.get("PYTHONIOENCODING", "utf-8"))
            code = int(pytest.main(arguments))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start a process that has imported PyTorch and forks each session: the import takes longer than most sessions."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.communicate)  # closes its input, which ends it
    return process


def run_pytest(
    *arguments: str, cwd: Path = ROOT, alone: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a session of pytest.

    Args:
        arguments: of pytest.
        cwd: the folder to start in.
        alone: use an interpreter of its own, for sessions whose imports matter. Otherwise fork a process that has
            imported PyTorch and this package.
        environment: further environment variables.
    """
    command = ["-p", "no:cacheprovider", *arguments]
    if "--benchmark" in arguments:  # other tests run at once, and repeats would double each session
        command.append("--specdecode-again=0")
    # The model is so small that a second thread only costs time.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if alone or (cwd != ROOT and (cwd / "specdecode").exists()):
        command = [sys.executable, "-m", "pytest", *command]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        # PyTorch has already imported modules that pytest would rewrite.
        command += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        server.stdin.write(json.dumps([command, str(cwd), variables, str(out), str(err)]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def run_pytest_in_turn(*commands: Sequence[str], cwd: Path = ROOT) -> list[tuple[int, str]]:
    """Return the exit code and the output of several sessions, run one after the other."""
    sessions = [run_pytest(*command, cwd=cwd) for command in commands]
    return [(session.returncode, session.stdout + session.stderr) for session in sessions]
