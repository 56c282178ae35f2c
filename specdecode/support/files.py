"""Write files that are there whole or not at all, and make names for them."""

from __future__ import annotations

import re
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, and give it its own when it is whole; missing folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.tmp")
    scratch.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    scratch.replace(file)


def slug(text: str) -> str:
    """The text as a file name: lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
