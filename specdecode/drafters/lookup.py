"""A drafter that copies tokens from an earlier place of the text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from specdecode.controllers.base import Limit
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, common_prefix
from specdecode.models.lm import LM


class PromptLookup:
    """A drafter that proposes the tokens after an earlier occurrence of the last tokens (prompt lookup decoding, Saxena
    2023).

    It looks for the longest suffix of the text, of `min_ngram` to `max_ngram` tokens, that occurred before, and copies
    from its most recent occurrence. A copy that reaches the end of the text continues with its own beginning. So a
    repeating text is continued at full length.

    Args:
        max_ngram: longest suffix to look for, in tokens.
        branches: largest number of different continuations in the tree, most recent first, within the limit.
        min_ngram: shortest suffix to look for, in tokens. A value above 1 gives fewer and more reliable proposals, for
            a `Cascade`, or where rows are expensive.

    Raises:
        ValueError: an argument is below 1, or `min_ngram` is above `max_ngram`.
    """

    forwards = 0
    layers = ()

    def __init__(self, max_ngram: int = 3, branches: int = 1, min_ngram: int = 1) -> None:
        if max_ngram < 1:
            raise ValueError(f"max_ngram is {max_ngram}: at least 1 token must be matched")
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram is {min_ngram}: it must be from 1 to max_ngram, {max_ngram}")
        if branches < 1:
            raise ValueError(f"branches is {branches}: at least 1 continuation must be proposed")
        self.max_ngram = max_ngram
        self.branches = branches
        self.min_ngram = min_ngram
        self._indexed: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tokens = list(context.tokens)
        self._index(tokens)
        # The tree is a trie: continuations with a common beginning share nodes.
        nodes: dict[tuple[int, int], int] = {}
        branches = 0
        for place in self._matches(tokens):
            grown = len(nodes)
            node = 0
            for offset in range(limit.depth):
                token = tokens[place + offset % (len(tokens) - place)]
                if (node, token) not in nodes:
                    if len(nodes) == limit.nodes:
                        break
                    nodes[node, token] = len(nodes) + 1
                node = nodes[node, token]
            branches += len(nodes) > grown
            if branches == self.branches or len(nodes) == limit.nodes:
                break
        return DraftTree(
            torch.tensor([token for _, token in nodes], dtype=torch.long),
            torch.tensor([parent for parent, _ in nodes], dtype=torch.long),
        )

    def _matches(self, tokens: list[int]) -> Iterator[int]:
        """Yield the places after earlier occurrences of the end of the text: the longest match first, and of several
        matches of one length the most recent first."""
        for size in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            # The last place is the end of the text itself, so it is left out.
            yield from reversed(self._places[tuple(tokens[-size:])][:-1])

    def _index(self, tokens: list[int]) -> None:
        """Index the places after each n-gram, ascending. If the text only grew since the last call, only its new tokens
        are read."""
        indexed = common_prefix(self._indexed, tokens)
        if indexed < len(self._indexed):
            self._places.clear()
            indexed = 0
        for end in range(indexed + 1, len(tokens) + 1):
            for size in range(self.min_ngram, min(self.max_ngram, end) + 1):
                self._places[tuple(tokens[end - size : end])].append(end)
        self._indexed = tokens


def examples(target: LM) -> dict[str, PromptLookup]:
    return {"lookup": PromptLookup(), "lookup-tree": PromptLookup(max_ngram=2, branches=3)}
