"""When a text ends before its length limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Stops:
    """The tokens and the strings that end a text. Both look at committed tokens alone, so they end it at the same token
    whatever was drafted.

    Strings are sought among bytes, as a character may be spread over several tokens. As in transformers' `generate`, a
    string may begin in the prompt or end inside of a token, and a token that the tokenizer lacks is part of no string.

    Args:
        token_ids: any of these tokens ends the text.
        strings: the text ends with the token that completes any of these in it.
        spell: the bytes that a token adds to a text, None if it has no text; needed for strings.

    Raises:
        ValueError: an empty string, which is in every text; or strings without a way to make text of tokens.
    """

    def __init__(
        self, token_ids: Sequence[int], strings: Sequence[str], spell: Callable[[int], bytes | None] | None
    ) -> None:
        if not all(strings):
            raise ValueError("a stop string is empty: it would end every text before it begins")
        if strings and spell is None:
            raise ValueError("stop strings need a tokenizer, and the target has none: give stop_token_ids instead")
        self._tokens = frozenset(token_ids)
        self._strings = tuple(string.encode(errors="surrogatepass") for string in strings)
        self._spell = spell
        # A token that has text brings a byte at least.
        self._most_tokens = max(map(len, self._strings), default=0)

    def find(self, before: Sequence[int], new: Sequence[int]) -> int | None:
        """Return the index of the first new token that ends the text; None if it goes on.

        Args:
            before: the text so far, with its prompt. It did not end there.
            new: the tokens that follow.
        """
        text = [*before[max(len(before) - self._most_tokens, 0) :], *new]
        start = len(text) - len(new)
        return next(
            (i for i, token in enumerate(new) if token in self._tokens or self._completes(text, start + i)), None
        )

    def _completes(self, text: Sequence[int], last: int) -> bool:
        """Whether a token completes a string: no more of the text than the longest one takes is looked at."""
        if self._spell is None or not self._strings:
            return False
        end = self._spell(text[last])
        if not end:
            return False
        parts: list[bytes] = []
        for token in reversed(text[max(last + 1 - self._most_tokens, 0) : last]):
            part = self._spell(token)
            if part is None:
                break
            parts.append(part)
        begin = b"".join(reversed(parts))
        # What was complete before this token has been found, or stands in the prompt.
        return any(string in (begin[len(begin) - min(len(begin), len(string) - 1) :] + end) for string in self._strings)
