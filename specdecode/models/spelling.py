"""The text that single tokens add to a text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# What tokens are decoded behind: a tokenizer may drop the space that a text begins with.
_CONTEXT = "abcdef"
# How a byte is named in vocabularies that fall back to bytes.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Half a surrogate pair, of which UTF-8 makes no character: Python waits for its third byte all the same.
_HALF_PAIR = re.compile(rb"\xed[\xa0-\xbf]")


class Spelling:
    """The bytes that each token of a tokenizer adds to a text, behind other tokens.

    A decoded slice of tokens is no slice of the decoded text: a character may be spread over several tokens, and the
    space before a first word is dropped. Bytes have no such seams: those of the tokens, joined, are the text's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer(_CONTEXT, add_special_tokens=False)["input_ids"]
        names: Any = tokenizer.convert_ids_to_tokens(ids)
        self._context: list[str] = names
        self._start = len(tokenizer.convert_tokens_to_string(self._context))
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._known: dict[int, bytes | None] = {}

    def __call__(self, token: int) -> bytes | None:
        """Return the bytes of a token; None if the tokenizer has no such token."""
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def text(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """Return the text that tokens add; without a character at its end of which bytes are missing.

        Args:
            tokens: that stand behind others.
            special: whether to include special tokens, such as those that end a turn of a chat.
        """
        return "".join(self.pieces(tokens, special=special))

    def pieces(self, tokens: Sequence[int], *, special: bool = True) -> Iterator[str]:
        """Yield the text that each token adds; a character spread over several stands with the last of them."""
        return map(self.reader(special=special).read, tokens)

    def reader(self, *, special: bool = True) -> Reader:
        """Return what reads tokens one by one, as they come."""
        return Reader(self, frozenset() if special else frozenset(self._special))

    def _spell(self, token: int) -> bytes | None:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return None
        text: str = self._tokenizer.convert_tokens_to_string([*self._context, name])[self._start :]
        if _INCOMPLETE not in text:
            return text.encode()
        # A part of a character, of which only the token's name says which.
        if byte := _BYTE.fullmatch(name):
            return bytes.fromhex(byte[1])
        if all(character in _NAMED_BYTES for character in name):
            return bytes(_NAMED_BYTES[character] for character in name)
        return text.encode()


class Reader:
    """Reads a text token by token.

    Args:
        spelling: of its tokenizer.
        unread: tokens that have no text for a reader.
    """

    def __init__(self, spelling: Spelling, unread: frozenset[int]) -> None:
        self._spelling = spelling
        self._unread = unread
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        """The bytes read of a character of which others are still to come."""
        return self._decoder.getstate()[0]

    def read(self, token: int) -> str:
        """Return the characters that a token completes."""
        spelled = None if token in self._unread else self._spelling(token)
        text = self._decoder.decode(spelled or b"")
        if _HALF_PAIR.match(self.pending):
            text += self._decoder.decode(b"", final=True)
        return text


def _named_bytes() -> dict[str, int]:
    """Return the byte behind each character of a byte-level token's name, as GPT-2 named them: printed bytes by
    themselves, the others by characters from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_NAMED_BYTES = _named_bytes()
