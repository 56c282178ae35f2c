"""Stream tokens as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdecode.cli.output import say

if TYPE_CHECKING:
    from specdecode import LM


class TextStream:
    """A stream that writes tokens as text as soon as they form whole characters.

    Special tokens, for example those that end a turn, are left out.

    Args:
        model: language model of the tokens, which continue earlier ones.
    """

    def __init__(self, model: LM) -> None:
        self._reader = model.spelling.reader(special=False)

    def add(self, tokens: list[int]) -> None:
        """Write the characters that these tokens complete."""
        say("".join(map(self._reader.read, tokens)), end="")

    def end(self) -> None:
        """End the line. A character with missing bytes is left out."""
        say("")
