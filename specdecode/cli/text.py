"""Write tokens as text."""

from __future__ import annotations

import sys
from typing import Any


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    """Return what tokens say to a reader: without the special ones, such as those that end a turn of a chat."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class TextStream:
    """Write tokens as text as soon as they are whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._written = 0

    def add(self, tokens: list[int]) -> None:
        self._tokens += tokens
        text = text_of(self._tokenizer, self._tokens)
        # A character may be spread over tokens: until it is complete it decodes to the replacement character.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def end(self) -> None:
        self._write(text_of(self._tokenizer, self._tokens) + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = len(text)
