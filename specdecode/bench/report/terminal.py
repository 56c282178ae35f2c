"""Text for terminals."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

_TABLE_WIDTH = 145  # characters


class _Uncropped(Console):
    """A console that prints lines that are longer than its width as they are."""

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*objects, crop=False, **how)


def console_text(show: Callable[[Console], None], colours: bool, encoding: str) -> str:
    """Return the shown text. Characters that the encoding lacks become "?"; table frames get simpler ones."""
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding, errors="replace", newline="\n") as text:
        show(_Uncropped(file=text, width=_TABLE_WIDTH, force_terminal=colours))
        text.flush()
        return content.getvalue().decode(encoding)
