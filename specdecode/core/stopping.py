"""Stop tokens and stop strings, which end a text before its length limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Stops:
    """The tokens and the strings that end a text.

    Both depend on committed tokens alone, so drafts do not change the end of a text. Strings are compared as bytes, as
    a character may be spread over several tokens. As in transformers' `generate`, a stop string may begin in the prompt
    or end inside a token. A token without text is part of no string.

    Args:
        token_ids: tokens that end the text.
        strings: strings that end the text. The text ends with the token that completes a string.
        spell: returns the bytes that a token adds to a text, or None for a token without text; needed for strings.

    Raises:
        ValueError: a string is empty, and so in every text; or there are strings, but no `spell`.
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
        # A token with text adds at least one byte, so a string spans at most as many tokens as it has bytes.
        self._most_tokens = max(map(len, self._strings), default=0)

    def find(self, before: Sequence[int], new: Sequence[int]) -> int | None:
        """Return the index in `new` of the first token that ends the text; None if no token does.

        Args:
            before: tokens of the prompt and of the text so far, which has not ended yet.
            new: the tokens that follow.
        """
        text = [*before[max(len(before) - self._most_tokens, 0) :], *new]
        start = len(text) - len(new)
        return next(
            (i for i, token in enumerate(new) if token in self._tokens or self._completes(text, start + i)), None
        )

    def _completes(self, text: Sequence[int], last: int) -> bool:
        """Return whether a token completes a stop string. Only as many tokens are read as the longest string may
        span."""
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
        # A string that is complete without this token was found before, or is inside the prompt.
        return any(string in (begin[len(begin) - min(len(begin), len(string) - 1) :] + end) for string in self._strings)
