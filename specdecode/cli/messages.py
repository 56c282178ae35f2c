"""Notes of a command on standard error, beside its output."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def noted_if_slow(text: str) -> Iterator[None]:
    """Write a note if the block takes longer than a second."""
    timer = threading.Timer(1.0, note, [text])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def note(text: str) -> None:
    """Write a line to standard error. A line that cannot be written is dropped."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
