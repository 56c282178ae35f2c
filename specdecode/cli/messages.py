"""What a command says beside its output."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def noted_if_slow(text: str) -> Iterator[None]:
    """Say what is going on once it takes a second."""
    timer = threading.Timer(1.0, note, [text])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def note(text: str) -> None:
    """Write a line on the standard error; where it cannot be written, go on without."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
