"""Writing to standard output: texts, JSON and tables."""

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
from rich.table import Table

from specdecode.support.messages import note

_TABLE_WIDTH = 130
"""Characters of a line where standard output is no terminal."""


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make the standard streams usable on any terminal for the block, and flush them at its end.

    Characters that a terminal cannot show are replaced. If the reader closes the pipe, as `head` does, the program ends
    silently with exit code 1.

    Raises:
        ValueError: standard output cannot be written, for example because the disk is full.
    """
    # A stream that the caller closed is None.
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
    """Write a text and flush it.

    Raises:
        BrokenPipeError: the reader has closed the pipe.
        ValueError: standard output cannot be written for another reason.
    """
    with _output():
        sys.stdout.write(text + end)
        sys.stdout.flush()


def say_json(value: Any) -> None:
    """Write a line of JSON. Characters that the encoding of the output lacks are escaped, so nothing is lost."""
    unicode = codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")
    say(json.dumps(value, ensure_ascii=not unicode))


def say_tables(*tables: RenderableType, **how: Any) -> None:
    """Write tables and texts with rich's `Console.print`, and crop no line. Brackets in them are text, not mark-up."""
    with _output():
        width = None if sys.stdout.isatty() else _TABLE_WIDTH
        Console(width=width, markup=False, emoji=False).print(*tables, crop=False, **how)


def plain_table(first: str, *others: str) -> Table:
    """Return an empty table without lines, with a column of texts and further columns of figures."""
    table = Table(box=None, pad_edge=False, header_style=None)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table


class Faults:
    """The faults of several files. One does not keep the others from being read.

    Attributes:
        sentences: messages written so far.
    """

    def __init__(self) -> None:
        self.sentences: set[str] = set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Turn a ValueError of the block into a note. A message that several files share is written once."""
        try:
            yield
        except ValueError as error:
            if str(error) not in self.sentences:
                note(f"specdecode: {error}")
            self.sentences.add(str(error))


@contextmanager
def _output() -> Iterator[None]:
    """Turn an OSError into a ValueError of one sentence, except for a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> ValueError:
    return ValueError(f"the standard output cannot be written: {error.strerror}")


def _flush(stream: Any) -> OSError | None:
    """Flush a stream; return the error if that fails."""
    try:
        stream.flush()
    except OSError as error:
        # Python flushes again at exit. Without this, it would print an error of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
