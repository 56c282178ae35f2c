"""Run untrusted programs in a contained process."""

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
    """The limits of one program.

    Attributes:
        seconds: time from start to end.
        memory_bytes: size of the address space, with Python's own 30 MB.
        output_bytes: size of the output.
        file_bytes: size of a single file.
        changes: number of times that the program may open a file for writing, or create, rename or remove one.
        reason_characters: length to which the message of the final error is cut.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 64 << 10
    file_bytes: int = 1 << 20
    changes: int = 64
    reason_characters: int = 200


def run(program: str, limits: Limits = Limits()) -> str:
    """Run a Python program, and return why it failed; "" if it reached its end.

    The program runs in a new, empty folder that is removed afterwards, without the environment, site-packages or input
    of this process. Whatever the program does, this function returns within the time limit. The program cannot use the
    network, start programs or processes, change files outside its folder, or read files outside its folder except
    Python's own library. This is enforced by an audit hook, by resource limits and, on Linux, where the kernel allows
    it, by a network namespace and Landlock. None of these needs privileges.

    This contains accidents and ordinary hostile programs. It is no security boundary: the hook is in the program's own
    process, and a program written against it can remove it, or report success. With Landlock (Linux 5.13 and later,
    unless switched off) even such a program cannot change files outside its folder. Without Landlock, only the rights
    of this process limit it. Run programs of an attacker in a virtual machine.

    Args:
        program: source of the program. A program that exits early, with any exit code, has not reached its end.
        limits: limits of the program.
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
                # Kill before waiting: until `wait`, no other process can get this process id.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if stopped:
        return stopped
    for line in reversed(output.split(b"\n")):
        if line.startswith(token.encode()):
            return line[len(token) + 1 :].decode(errors="replace")
    return "it ended before it was done"


def _read(pipe: IO[bytes], limits: Limits) -> tuple[bytes, str]:
    """Return the output of a process, and the limit that it exceeded, as a sentence; "" if it ended within limits."""
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
