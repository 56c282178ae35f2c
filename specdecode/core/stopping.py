"""When a text ends before its length limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Stops:
    """The tokens and the strings that end a text. Both look at committed tokens alone, so they end it at the same token
    whatever was drafted.

    Args:
        token_ids: any of these tokens ends the text.
        strings: the text ends with the token that completes any of these in it.
        decode: text of token ids, special tokens included; needed for strings.

    Raises:
        ValueError: an empty string, which is in every text; or strings without a way to make text of tokens.
    """

    def __init__(
        self, token_ids: Sequence[int], strings: Sequence[str], decode: Callable[[Sequence[int]], str] | None
    ) -> None:
        if not all(strings):
            raise ValueError("a stop string is empty: it would end every text before it begins")
        if strings and decode is None:
            raise ValueError("stop strings need a tokenizer, and the target has none: give stop_token_ids instead")
        self._tokens = frozenset(token_ids)
        self._strings = tuple(strings)
        self._decode = decode
        # A token brings a byte at least, and a character has at most four.
        self._reach = 4 * max(map(len, strings), default=0)

    def find(self, tokens: Sequence[int], start: int) -> int | None:
        """Of the tokens from `start` on, the index of the first that ends the text; None if it goes on.

        Args:
            tokens: the text so far, without the prompt.
            start: the ones before it do not end the text.
        """
        return next(
            (i for i in range(start, len(tokens)) if tokens[i] in self._tokens or self._completes(tokens, i)), None
        )

    def _completes(self, tokens: Sequence[int], last: int) -> bool:
        if not self._strings or self._decode is None:
            return False
        text = self._decode(tokens[max(0, last - self._reach) : last + 1])
        return any(string in text for string in self._strings)
