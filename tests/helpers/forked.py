"""Workers of comparisons, forked from a process that has imported PyTorch: the import takes longer than their runs.

`-p tests.helpers.forked` gives them to a session of pytest, and `use_forks` to any program.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from specdecode.bench.measure import versions


def use_forks() -> None:
    """Fork the workers of this process from it."""
    replaced: Any = SimpleNamespace(Popen=ForkedModule, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    versions.subprocess = replaced


def pytest_configure() -> None:
    use_forks()


class ForkedModule:
    """A stand-in for `subprocess.Popen` of `python -m MODULE`: a fork that imports this package anew, from its folder.

    It keeps PyTorch and transformers as they are. Only what `WorkerProcess` uses is here.
    """

    def __init__(
        self, command: Sequence[str], cwd: Path, env: Mapping[str, str], stderr: IO[bytes], **pipes: Any
    ) -> None:
        python, option, module = command
        assert (python, option) == (sys.executable, "-m")
        assert pipes == {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        (its_input, our_output), (our_input, its_output) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for stream, file in enumerate((its_input, its_output, stderr.fileno())):
                os.dup2(file, stream)
            os.closerange(3, max(its_input, our_output, our_input, its_output) + 1)
            _run(module, cwd, env)
        os.close(its_input)
        os.close(its_output)
        self._code: int | None = None
        self.stdin, self.stdout = os.fdopen(our_output, "w"), os.fdopen(our_input)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, input: str = "", timeout: float | None = None) -> None:
        with suppress(BrokenPipeError):  # as in `subprocess`, if the process died before it read all
            if input:
                self.stdin.write(input)
            self.stdin.close()
        if not self.stdout.closed:
            self.stdout.read()
            self.stdout.close()
        self.wait()


def _run(module: str, cwd: Path, env: Mapping[str, str]) -> None:
    """Run a module of this package in the fork, and end it."""
    code = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for name in [name for name in sys.modules if name.partition(".")[0] == "specdecode"]:
            del sys.modules[name]
        sys.path[:0] = [str(cwd), *env.get("PYTHONPATH", "").split(os.pathsep)]
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(stream, mode) for stream, mode in enumerate("rww"))
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
