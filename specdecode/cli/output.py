"""What a command writes on the standard output."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

_TABLE_WIDTH = 130
"""Characters of a line where the output is no terminal."""


@contextmanager
def standard_streams() -> Iterator[None]:
    """Let the standard streams take what the block writes, on any terminal, and end the block when all is written.

    What a terminal cannot show is replaced. A reader that goes away, as `head` does, ends the program without a word,
    with exit code 1.

    Raises:
        ValueError: the standard output cannot be written, as on a full disk.
    """
    # Python has None where the caller closed a stream.
    sys.stdout, sys.stderr = (
        stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") for stream in (sys.stdout, sys.stderr)
    )
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        yield
    except BrokenPipeError:
        sys.exit(1)
    finally:
        _flush(sys.stderr)
        if failure := _flush(sys.stdout):
            if failure.errno == errno.EPIPE:
                sys.exit(1)
            raise _unwritable(failure)


def say(text: str, end: str = "\n") -> None:
    """Write a text at once.

    Raises:
        BrokenPipeError: nobody reads it any more.
        ValueError: it cannot be written for another reason.
    """
    with _output():
        sys.stdout.write(text + end)
        sys.stdout.flush()


def say_json(value: Any) -> None:
    """Write a line of JSON. What the encoding of the output lacks is escaped, so that nothing is lost."""
    unicode = codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")
    say(json.dumps(value, ensure_ascii=not unicode))


def say_tables(*tables: RenderableType, **how: Any) -> None:
    """Write tables and texts, as rich's `Console.print`."""
    with _output():
        Console(width=None if sys.stdout.isatty() else _TABLE_WIDTH).print(*tables, **how)


@contextmanager
def _output() -> Iterator[None]:
    """Say in one sentence that the standard output cannot be written; a reader that went away is another matter."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> ValueError:
    return ValueError(f"the standard output cannot be written: {error.strerror}")


def _flush(stream: Any) -> OSError | None:
    """Write what is left in a stream; return why that failed."""
    try:
        stream.flush()
    except OSError as error:
        # Python writes it once more when it ends, and would complain in words of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
