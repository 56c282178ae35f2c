"""Write tokens as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdecode.cli.output import say

if TYPE_CHECKING:
    from specdecode import LM


class TextStream:
    """Write tokens as text as soon as they are whole characters, without special tokens such as those that end a turn.

    Args:
        model: of the tokens, which stand behind others.
    """

    def __init__(self, model: LM) -> None:
        self._reader = model.spelling.reader(special=False)

    def add(self, tokens: list[int]) -> None:
        """Write the characters that these tokens complete."""
        say("".join(map(self._reader.read, tokens)), end="")

    def end(self) -> None:
        """End the line. A character of which bytes are missing is left out."""
        say("")
