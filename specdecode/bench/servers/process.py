"""A server as a process: started, awaited until it is ready, and ended whatever happens."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from specdecode.bench.servers.errors import ServerError
from specdecode.bench.servers.keeper import GRACE_S
from specdecode.support.files import writing

_KEEPER = Path(__file__).with_name("keeper.py")
_POLL_S = 0.1

# An exception as Python prints it, with its text.
_ERROR = re.compile(r"\b\w*(Error|Exception): \S")
_LAST_LINES, _MOST_WORDS = 2, 400


class ServerProcess:
    """A server in a process group of its own (`keeper`), with its output in a file.

    Args:
        command: words of the server's command.
        environment: variables in addition to those of this process.
        log: file for the output of the server.

    Raises:
        ValueError: the log cannot be written.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._how: str | None = None
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"{shlex.join(command)}\n", encoding="utf-8")
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", str(_KEEPER), str(log), *command],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def check(self, within_s: float = 0.0) -> None:
        """Raise ServerError if the server has ended, or ends within some seconds."""
        try:
            self._keeper.wait(within_s)
        except subprocess.TimeoutExpired:
            return
        if self._how is None:  # the pipe can be read once
            assert self._keeper.stdout is not None
            self._how = self._keeper.stdout.read().strip() or "was killed"
        raise ServerError(f"its server {self._how}{self._last_words()}")

    def wait(self, answers: Callable[[], bool], minutes: float) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: the server ends, or takes too long.
        """
        deadline = time.monotonic() + 60 * minutes
        while not answers():
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"its server is not ready after {minutes:g} minutes, its start_minutes{self._last_words()}"
                )
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the server and all processes of its group."""
        assert self._keeper.stdin is not None
        with suppress(OSError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()

    def _last_words(self) -> str:
        """Return the reason for the server's end: the first error in the log, because later ones follow from it, or
        else the last lines."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")[1:]
        said = [line.strip() for line in lines if line.strip()]
        if not said:
            return ""
        words = next(filter(_ERROR.search, said), None) or " / ".join(said[-_LAST_LINES:])
        return f"; it said: {words[:_MOST_WORDS]} (full log: {self.log})"


def words_of(command: str, values: Mapping[str, object]) -> list[str]:
    """Return the words of a command with its placeholders filled in. Other braces stay: options are often JSON."""
    words = shlex.split(command)
    for name, value in values.items():
        words = [word.replace(f"{{{name}}}", str(value)) for word in words]
    return words


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listeners(port: int) -> Collection[int]:
    """Return the ids of the processes that listen on a port of this machine, as far as this user may see them."""
    with suppress(psutil.Error, OSError):
        return {
            one.pid
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid is not None
        }
    return ()
