"""Write files that are there whole or not at all, and make names for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give a temporary path beside a file, move it onto the file when the block ends well, and delete it otherwise.

    Each call has a path of its own, so that two processes may write the same file at once. Missing folders are made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    try:
        yield scratch
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all. What UTF-8 cannot hold (lone surrogates) becomes "?"."""
    with whole(file) as scratch:
        scratch.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def slug(text: str) -> str:
    """The text as a file name: lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
