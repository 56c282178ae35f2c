"""A test body in another commit: a process with that commit's files times the test's function on request."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from specdecode.bench.measure.paired import TimedFunction
from specdecode.support.worktree import import_environment

CHANNEL = "SPECDECODE_PAIRED_CHANNEL"
"""Environment variable: the file descriptor for requests to the process of another commit."""

_LONGEST_END_S = 10.0


class OtherVersionError(ValueError):
    """The other commit cannot run the test, or its value cannot be compared; the message gives the reason."""


class OtherVersion:
    """A test that runs with another commit's files, and waits for requests at its call of `paired`.

    Args:
        ref: name of the commit, for messages.
        folder: folder of the commit's files. The test's file and its conftest.py files are copied there, so that the
            body is the same.
        root: folder of the working tree.
        test: node id of the test, relative to the root.
        arguments: further arguments for pytest.

    Attributes:
        side: the function of the other commit.

    Raises:
        OtherVersionError: the test cannot run there, or its value cannot be sent; the message gives the reason.
    """

    def __init__(self, ref: str, folder: Path, root: Path, test: str, arguments: Sequence[str] = ()) -> None:
        file, _, name = test.partition("::")
        _copy_test(Path(file), root, folder)
        self._ref = ref
        self._channel, theirs = Pipe()
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={folder}", *arguments]
        with theirs:
            self._process = subprocess.Popen(
                [*command, f"{folder / file}::{name}"],
                cwd=folder,
                env={**import_environment(folder), CHANNEL: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that `close` can also kill processes that the test starts
            )
        try:
            value, counters = self._receive()
        except BaseException:
            self.close()
            raise
        self.side = TimedFunction(ref, value, self._receive, counters, self._process.pid)

    def _receive(self, loops: int | None = None) -> Any:
        """Return the next content from the process. With `loops`, first ask it to time that many calls."""
        try:
            if loops is not None:
                self._channel.send(loops)
            kind, content = pickle.loads(self._channel.recv_bytes())
        except (EOFError, OSError):
            self._process.wait()
            self._words.seek(0)
            lines = self._words.read().decode(errors="replace").strip().splitlines()
            errors = [line for line in lines if line.startswith("E  ")] or lines or ["it printed nothing"]
            raise OtherVersionError(
                f"{self._ref} cannot run this test: {errors[-1].removeprefix('E').strip()}"
            ) from None
        except Exception as error:
            raise OtherVersionError(f"the value of {self._ref} cannot be read here: {error}") from error
        if kind == "error":
            raise OtherVersionError(f"{self._ref} cannot run this test: {content}")
        return content

    def close(self) -> None:
        """Let the test and its fixtures end. Kill the process and those it started, after 10 seconds at most."""
        self._channel.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LONGEST_END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._words.close()


def _copy_test(file: Path, root: Path, folder: Path) -> None:
    """Copy a test's file, and each conftest.py above it, to the same place in another folder."""
    for copied in (file, *(above / "conftest.py" for above in file.parents)):
        if (root / copied).is_file():
            (folder / copied).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / copied, folder / copied)


def answer(side: TimedFunction) -> None:
    """Send the function's value, then time its calls on request until the channel closes.

    This runs in the process of another commit.
    """
    channel = Connection(int(os.environ[CHANNEL]))
    try:
        sent = pickle.dumps(("value", (side.value, side.counters)))
    except Exception as error:
        sent = pickle.dumps(("error", f"its value cannot be sent for the comparison ({error}): return plain values"))
    channel.send_bytes(sent)
    while True:
        try:
            loops = channel.recv()
        except (EOFError, OSError):
            return  # the other side has measured enough
        channel.send_bytes(pickle.dumps(("value", side.time(loops))))
