"""The keeper of a server: it runs the server's command, and ends all processes of the server when its parent is gone.

This file is run by its path, and needs only the standard library: `python keeper.py LOG COMMAND...`. It leads a process
group of its own, which includes the server. It ends the group when its standard input is closed. That happens however
the process at the other end dies. When the server ends by itself, the keeper writes the exit code to standard output.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE_S = 15.0
"""Seconds from SIGTERM to SIGKILL, in which a server can end by itself."""


def _end(server: subprocess.Popen[bytes], code: int | None) -> None:
    """End the process group, including this process."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + (GRACE_S if code is None else 0.5)
    while time.monotonic() < deadline and (code is not None or server.poll() is None):
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def _tell(how: str) -> None:
    """Write how the server ended to the parent, which may be dead."""
    with suppress(OSError):
        sys.stdout.write(how)
        sys.stdout.flush()


def main() -> None:
    """Run the server until it ends, or until the standard input is closed."""
    log, *command = sys.argv[1:]
    # This process must outlive the SIGTERM to its group. SIG_IGN would not do: the server would inherit it.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with open(log, "ab") as words:
        try:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        except OSError as error:
            _tell(f"cannot be started: {command[0]}: {error.strerror}")
            return

    def wait_for_the_end_of_input() -> None:
        sys.stdin.buffer.read()
        _end(server, None)

    threading.Thread(target=wait_for_the_end_of_input, daemon=True).start()
    code = server.wait()
    _tell(f"ended with exit code {code}")
    _end(server, code)  # ends the processes that the server left behind


if __name__ == "__main__":
    main()
