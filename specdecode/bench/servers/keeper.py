"""Keep a server: run its command, and end all of its processes when whoever started this one is gone.

This file is run by its path, and needs the standard library alone: `python keeper.py LOG COMMAND...`. It leads a
process group of its own, in which the server is. It ends the group when its standard input is closed, which happens
however the process at the other end dies. When the server ends by itself, it writes the exit code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 15.0
"""Seconds that a server has to end by itself."""


def _end(server: subprocess.Popen[bytes], code: int | None) -> None:
    """End the group, this process with it."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + (GRACE_S if code is None else 0.5)
    while time.monotonic() < deadline and (code is not None or server.poll() is None):
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the server until it ends, or the standard input does."""
    log, *command = sys.argv[1:]
    # To outlive the signal that ends the others. A signal that is ignored would be ignored by the server, too.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with open(log, "ab") as words:
        try:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        except OSError as error:
            sys.stdout.write(f"cannot be started: {command[0]}: {error.strerror}")
            return

    def wait_for_the_end_of_input() -> None:
        sys.stdin.buffer.read()
        _end(server, None)

    threading.Thread(target=wait_for_the_end_of_input, daemon=True).start()
    code = server.wait()
    sys.stdout.write(f"ended with exit code {code}")
    sys.stdout.flush()
    _end(server, code)  # what it has left


if __name__ == "__main__":
    main()
