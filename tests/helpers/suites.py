"""Runs of the package's suites under pytest, in processes of their own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

from tests.helpers.root import ROOT

# Where the package is installed, pytest finds the plugin by itself and refuses a second one.
_INSTALLED = any(entry.name == "specdecode" for entry in entry_points(group="pytest11"))
ELSEWHERE = ("--benchmark",) if _INSTALLED else ("-p", "specdecode.bench.plugin", "--benchmark")
"""Arguments that start the speed suite in a folder that is not this repository's."""


_SERVER = """
import gc, json, os, signal, sys, traceback
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
import pytest, rich.console, torch, transformers.models.llama.modeling_llama
import specdecode.bench.measure.speed_session, specdecode.bench.report.html, specdecode.bench.summary
from specdecode.bench.measure import bandwidth
for package in ("beartype", "evaluate", "hypothesis", "matplotlib.figure", "scipy.stats"):
    with suppress(ImportError):  # an image for GPUs may lack it
        import_module(package)
bandwidth._READ_BYTES = 2**20  # no test depends on the bandwidth
for plugin in entry_points(group="pytest11"):
    if plugin.name != "specdecode":
        plugin.load()
gc.collect()
gc.freeze()  # each timed run collects garbage first, and would search all that is imported here
for line in sys.stdin:
    arguments, folder, variables, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            # Tests in a shell's background ignore the signal, and their children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for stream, file in zip((0, 1, 2), (os.devnull, *files)):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(variables)
            sys.path[1:1] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(encoding=variables.get("PYTHONIOENCODING", "utf-8"))
            if arguments[0] == "-c":
                sys.argv = ["-c", *arguments[2:]]
                exec(arguments[1], {"__name__": "__main__"})
                code = 0
            else:
                code = int(pytest.main(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start a process that has imported PyTorch and forks each session: the import takes longer than most sessions."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=_variables({"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.communicate)  # closes its input, which ends it
    return process


class Session:
    """A session of pytest, or a program, in a fork of the process that has imported PyTorch and this package.

    Args:
        command: arguments of pytest; or "-c", a program and its arguments, as for Python.
        cwd: the folder to start in.
        variables: all environment variables.

    Attributes:
        pid: the session's process.
    """

    def __init__(self, command: list[str], cwd: Path, variables: dict[str, str]) -> None:
        # A test that failed did not wait for its session, whose exit code would be read as this one's process.
        for left in [*_running]:
            with suppress(ProcessLookupError):
                os.kill(left.pid, signal.SIGKILL)
            left.wait()
        self._command = command
        self._folder = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._folder.name, stream)) for stream in ("out", "err")]
        self._server = _server()
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([self._command, str(cwd), variables, *self._files]) + "\n")
        self._server.stdin.flush()
        self.pid = int(self._answer())
        _running.append(self)

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def ended(self) -> bool:
        """Return whether the session has ended, without waiting for it."""
        assert self._server.stdout is not None
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def output(self) -> str:
        """Return the standard output so far."""
        out = Path(self._files[0])
        return out.read_text() if out.exists() else ""

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the session. The next one that starts kills a session that was not waited for."""
        code = int(self._answer())
        _running.remove(self)
        with self._folder:
            out, err = (Path(file).read_text() for file in self._files)
        return subprocess.CompletedProcess(self._command, code, out, err)


_running: list[Session] = []


def _command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of pytest that all sessions need, and those that are given."""
    # Other tests run at once, and repeats would double each session.
    again = ["--specdecode-again=0"] if "--benchmark" in arguments else []
    return ["-p", "no:cacheprovider", *again, *arguments]


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    # The model is so small that a second thread only costs time. And Python would take compiled code for that of a file
    # which a test has changed within a second, to the same size.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}


def start_pytest(*arguments: str, cwd: Path = ROOT, **environment: str) -> Session:
    """Start a session of pytest, and return before it ends: see `run_pytest`."""
    # PyTorch has already imported modules that pytest would rewrite.
    command = [*_command(arguments), "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return Session(command, cwd, _variables(environment))


def start_python(program: str, *arguments: str) -> Session:
    """Start a program in a fork of the process that has imported PyTorch and this package."""
    return Session(["-c", program, *arguments], ROOT, _variables({}))


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
    if alone or (cwd != ROOT and (cwd / "specdecode").exists()):
        command = [sys.executable, "-m", "pytest", *_command(arguments)]
        variables = _variables(environment)
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    return start_pytest(*arguments, cwd=cwd, **environment).wait()


def run_pytest_in_turn(*commands: Sequence[str], cwd: Path = ROOT) -> list[tuple[int, str]]:
    """Return the exit code and the output of several sessions, run one after the other."""
    sessions = [run_pytest(*command, cwd=cwd) for command in commands]
    return [(session.returncode, session.stdout + session.stderr) for session in sessions]
