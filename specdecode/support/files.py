"""Write files completely or not at all, read text files, and build file names."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_PROBE_BYTES = 4096
"""Bytes that a check writes: even a full disk accepts empty files."""

_MOST_CHARACTERS = 255 - len(".tmp") - len(f".{uuid4().hex}")
"""Characters of a file's name that file systems accept, less those that `whole` adds to it."""


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn an OSError of the block into one sentence: the file cannot be written, and why.

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
    """Yield a temporary path beside a file. It replaces the file if the block succeeds, and is deleted otherwise.

    Each call has its own path, so that two processes may write the same file at the same time. Missing folders are
    created. A link stays, and the file that it points to is written. For a device or a pipe, such as /dev/stdout, the
    path itself is yielded.

    Raises:
        ValueError: the file cannot be written; the message says why.
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
    """Write a file completely or not at all. Characters that UTF-8 cannot hold (lone surrogates) become "?".

    Raises:
        ValueError: the file cannot be written; the message says why.
    """
    with whole(file) as scratch:
        scratch.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file in UTF-8, with or without a byte-order mark.

    Only a newline ends a line. Unicode has other line ends, which a text may contain.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: the file is no text in UTF-8.
    """
    return [line.removesuffix("\r") for line in file.read_bytes().decode("utf-8-sig").split("\n")]


def check_writable(file: Path) -> None:
    """Check, before minutes of work, that a file can be written. Missing folders are created; the file is unchanged.

    Raises:
        ValueError: the file cannot be written; the message says why.
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
        # `whole` writes a new file first, so the folder must accept a new file.
        with tempfile.TemporaryFile(dir=place.parent) as probe:
            probe.write(b"\0" * _PROBE_BYTES)


def is_device(file: Path) -> bool:
    """Return whether a path is a device or a pipe. Moving a file onto it would replace it."""
    return file.exists() and not file.is_file() and not file.is_dir()


SLUG = r"^(?!.*--)([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$"
"""Regular expression of the texts that `slug` leaves unchanged."""


def slug(text: str) -> str:
    """Return the text as a file name: lower-case letters, digits, dots and dashes; a digest if it has none of them."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    return name or (_digest(text) if text else "")


def fitting(name: str) -> str:
    """Return a file's name. If file systems could refuse it as too long, a digest of the name replaces its middle.

    Names have the user's paths of models in them, which may be long. The end, such as a type and a suffix, stays.
    """
    if len(name) <= _MOST_CHARACTERS:
        return name
    return f"{name[:100]}-{_digest(name)}-{name[-60:]}"


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's contents, in 64 hexadecimal digits. Large files are not held in memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder of fetched models and of what was tried on this machine: $SPECDECODE_CACHE, or the user's cache
    folder.

    Raises:
        ImportError: the variable is not set, and platformdirs is not installed.
    """
    if folder := os.environ.get("SPECDECODE_CACHE"):
        return Path(folder)
    import platformdirs  # only here: a machine without it can still measure architectures

    return Path(platformdirs.user_cache_dir("specdecode"))
