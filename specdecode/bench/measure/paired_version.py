"""Run a test body in another commit too: a process in that commit's files times its function on demand."""

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

from specdecode.bench.measure.paired import Side
from specdecode.support.worktree import import_environment

CHANNEL = "SPECDECODE_PAIRED_CHANNEL"
"""Environment variable: the file descriptor by which the process of another commit is asked."""

_LONGEST_END_S = 10.0


class OtherVersionError(ValueError):
    """The other commit cannot run the test, or its value cannot be compared; the sentence says why."""


class OtherVersion:
    """A test that runs in another commit's files, and waits where it calls `paired`.

    Args:
        ref: of the commit, for messages.
        folder: of its files; the test's own file and its conftest.py files are copied there: the body is the same.
        root: of the working tree.
        test: node id of the test, below the root.
        arguments: further ones for pytest.

    Attributes:
        side: its function.

    Raises:
        OtherVersionError: the test cannot run there, or its value cannot be sent; the sentence says why.
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
                start_new_session=True,  # what the test starts ends with it
            )
        try:
            value, counters = self._receive()
        except BaseException:
            self.close()
            raise
        self.side = Side(ref, value, self._receive, counters, self._process.pid)

    def _receive(self, loops: int | None = None) -> Any:
        """Return what the process sends next, after asking it to time some calls, if any."""
        try:
            if loops is not None:
                self._channel.send(loops)
            kind, content = pickle.loads(self._channel.recv_bytes())
        except (EOFError, OSError):
            self._process.wait()
            self._words.seek(0)
            lines = self._words.read().decode(errors="replace").strip().splitlines()
            errors = [line for line in lines if line.startswith("E  ")] or lines or ["it says nothing"]
            raise OtherVersionError(
                f"{self._ref} cannot run this test: {errors[-1].removeprefix('E').strip()}"
            ) from None
        except Exception as error:
            raise OtherVersionError(f"the value of {self._ref} cannot be read here: {error}") from error
        if kind == "error":
            raise OtherVersionError(f"{self._ref} cannot run this test: {content}")
        return content

    def close(self) -> None:
        """Let the test end, with its fixtures; kill the process and those it started if they take too long."""
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
    """Copy a test's file from one folder to the same place in another, and each conftest.py that it has fixtures of."""
    for copied in (file, *(above / "conftest.py" for above in file.parents)):
        if (root / copied).is_file():
            (folder / copied).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / copied, folder / copied)


def answer(side: Side) -> None:
    """In the process of another commit: send what its function returned, then time calls as long as it is asked to."""
    channel = Connection(int(os.environ[CHANNEL]))
    try:
        sent = pickle.dumps(("value", (side.value, side.counters)))
    except Exception as error:
        sent = pickle.dumps(("error", f"its value cannot be sent to be compared ({error})"))
    channel.send_bytes(sent)
    while True:
        try:
            loops = channel.recv()
        except (EOFError, OSError):
            return  # the other side has measured enough
        channel.send_bytes(pickle.dumps(("value", side.time(loops))))
