"""Write files that are there whole or not at all, and make names for them."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_PROBE_BYTES = 4096
"""What a check writes: a full disk still takes empty files."""


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Say in one sentence that a file cannot be written, where the block fails to.

    Raises:
        ValueError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            in_the_way = [str(folder) for folder in file.parents if folder.exists() and not folder.is_dir()]
            reason = f"{in_the_way[0]} is no folder" if in_the_way else reason
        raise ValueError(f"{file} cannot be written: {reason}") from None


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give a temporary path beside a file, move it onto the file when the block ends well, and delete it otherwise.

    Each call has a path of its own, so that two processes may write the same file at once. Missing folders are made. A
    link stays, and what it points to is written. A device or a pipe, such as /dev/stdout, is given itself.

    Raises:
        ValueError: the file cannot be written; the sentence says why.
    """
    with writing(file):
        if is_device(file):
            yield file
            return
        place = Path(os.path.realpath(file))
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_name(f"{place.name}.{uuid4().hex}.tmp")
        try:
            yield scratch
            scratch.replace(place)
        finally:
            scratch.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all. What UTF-8 cannot hold (lone surrogates) becomes "?".

    Raises:
        ValueError: it cannot be written; the sentence says why.
    """
    with whole(file) as scratch:
        scratch.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file in UTF-8, with or without a byte-order mark.

    A line ends at a newline alone. Unicode knows other ends of lines, and a text may hold them.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text in UTF-8.
    """
    return [line.removesuffix("\r") for line in file.read_bytes().decode("utf-8-sig").split("\n")]


def check_writable(file: Path) -> None:
    """Check, before minutes of work, that a file can be written. Missing folders are made; the file stays as it is.

    Raises:
        ValueError: it cannot be written; the sentence says why.
    """
    with writing(file):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if is_device(file):
            if not os.access(file, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        place = Path(os.path.realpath(file))
        place.parent.mkdir(parents=True, exist_ok=True)
        # Under a temporary name first, as `whole` writes: so it is the folder that must take a new file.
        with tempfile.TemporaryFile(dir=place.parent) as probe:
            probe.write(b"\0" * _PROBE_BYTES)


def is_device(file: Path) -> bool:
    """Whether it is a device or a pipe: a file that is moved onto it would take its place."""
    return file.exists() and not file.is_file() and not file.is_dir()


SLUG = r"^(?!.*--)([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$"
"""Regular expression of the texts that `slug` leaves as they are."""


def slug(text: str) -> str:
    """Return the text as a file name: lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
