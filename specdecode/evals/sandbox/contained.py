"""Programs that nobody has read, run in a process of their own."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

_INSIDE = Path(__file__).with_name("inside.py")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: from its start to its end.
        memory_bytes: of its address space, Python's own 30 MB included.
        output_bytes: that it prints.
        file_bytes: of one file.
        changes: how often it may open a file for writing, or make, rename or remove one.
        reason_characters: of the error that ended it, as many are kept.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 64 << 10
    file_bytes: int = 1 << 20
    changes: int = 64
    reason_characters: int = 200


def run(program: str, limits: Limits = Limits()) -> str:
    """Run a Python program, and tell why it failed; "" if it came to its end.

    It runs in a new, empty folder that is removed afterwards, without the environment, site-packages or input of this
    process, and whatever it does, this returns within its time. Refused are the network, other programs and
    processes, changes to files outside of the folder, and reading other files than Python's own library: by an audit
    hook, by resource limits and, on Linux, where the kernel allows it, by a network namespace and Landlock. None of
    that needs privileges.

    This contains accidents and ordinary hostile programs. It is no security boundary: the hook is in the program's own
    process, and a program written against it can take it away, or have itself counted as right. Where there is Landlock
    (Linux 5.13 and later, unless switched off) it can change no file outside even then; elsewhere only the rights of
    this process hold it back. Programs of someone who wishes you ill belong into a virtual machine.

    Args:
        program: its source. One that leaves early, with whatever exit code, has not come to its end.
        limits: what it may use.
    """
    token = secrets.token_hex(16)
    instructions = {"program": program, "token": token, "limits": asdict(limits)}
    with (
        tempfile.TemporaryDirectory(prefix="contained-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+") as stdin,
    ):
        json.dump(instructions, stdin)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_INSIDE)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=os.path.realpath(folder),
            env={},
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout as pipe:
            try:
                output, stopped = _read(pipe, limits)
            finally:
                # Before it is waited for: until then nobody else can have its number.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if stopped:
        return stopped
    for line in reversed(output.split(b"\n")):
        if line.startswith(token.encode()):
            return line[len(token) + 1 :].decode(errors="replace")
    return "it ended before it was done"


def _read(pipe: IO[bytes], limits: Limits) -> tuple[bytes, str]:
    """What a process writes before it ends, and, if it may not go on until then, why."""
    output, end = b"", time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0 and selector.select(left):
            chunk = os.read(pipe.fileno(), 1 << 16)
            if not chunk:
                return output, ""
            output += chunk
            if len(output) > limits.output_bytes:
                return output, f"it wrote more than {limits.output_bytes} bytes"
    return output, f"it took longer than {limits.seconds:g} s"
