"""The bytes and characters that single tokens add to a text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Text before the token that is decoded: a tokenizer may drop the space at the start of a text.
_CONTEXT = "abcdef"
# Name of a byte's token in vocabularies that fall back to bytes.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Byte of each character in the names of byte-level tokens, as in GPT-2.
_NAMED_BYTES: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# The first bytes of half a surrogate pair, which is no character in UTF-8. Python's decoder still waits for a third
# byte.
_HALF_PAIR = re.compile(rb"\xed[\xa0-\xbf]")


class Spelling:
    """The bytes that each token of a tokenizer adds to a text, after other tokens.

    Decoding a slice of the tokens does not give a slice of the decoded text: a character may be spread over several
    tokens, and the space before a first word is dropped. With bytes this problem does not occur: the joined bytes of
    all tokens are the bytes of the text.

    Args:
        tokenizer: the tokenizer.
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
        """Return the text that tokens add to a text. An incomplete character at its end is left out.

        Args:
            tokens: token ids, which follow other tokens.
            special: whether to include special tokens, such as the end of a turn of a chat.
        """
        return "".join(self.pieces(tokens, special=special))

    def pieces(self, tokens: Sequence[int], *, special: bool = True) -> Iterator[str]:
        """Yield the text that each token adds. A character that is spread over several tokens counts to the last one.

        Args:
            tokens: token ids, which follow other tokens.
            special: whether to include special tokens.
        """
        return map(self.reader(special=special).read, tokens)

    def reader(self, *, special: bool = True) -> Reader:
        """Return a reader that decodes tokens one by one.

        Args:
            special: whether to include special tokens.
        """
        return Reader(self, frozenset() if special else frozenset(self._special))

    def _spell(self, token: int) -> bytes | None:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return None
        text: str = self._tokenizer.convert_tokens_to_string([*self._context, name])[self._start :]
        if _INCOMPLETE not in text:
            return text.encode()
        # The token is a part of a character. Only its name shows the bytes.
        if byte := _BYTE.fullmatch(name):
            return bytes.fromhex(byte[1])
        if all(character in _NAMED_BYTES for character in name):
            return bytes(_NAMED_BYTES[character] for character in name)
        return text.encode()


class Reader:
    """A decoder that reads a text token by token.

    Args:
        spelling: the bytes of the tokenizer's tokens.
        unread: tokens that are left out of the text.
    """

    def __init__(self, spelling: Spelling, unread: frozenset[int]) -> None:
        self._spelling = spelling
        self._unread = unread
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        """The first bytes of an incomplete character at the end of the text so far."""
        return self._decoder.getstate()[0]

    def read(self, token: int) -> str:
        """Return the characters that a token completes."""
        spelled = None if token in self._unread else self._spelling(token)
        text = self._decoder.decode(spelled or b"")
        if _HALF_PAIR.match(self.pending):
            text += self._decoder.decode(b"", final=True)
        return text
