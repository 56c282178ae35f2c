"""Proposals from a model of another vocabulary, by way of text."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from specdecode.controllers.base import Limit
from specdecode.core.errors import TokenizerMismatchError
from specdecode.core.sampling import Sampling
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context
from specdecode.drafters.model import ModelDrafter
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll

# Target tokens that are translated at once: few enough that it costs little to do so at every step, and enough that it
# hardly matters that no token of the draft reaches across the end of a block.
_BLOCK = 256
# Translated blocks that are remembered.
_BLOCKS = 1024
# Tokens that stand before a text when it is cut: enough for the word that it may go on with.
_BEHIND = 8
# What tokens decode to that are bytes of a character, but not all of them.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# What text stands behind where nothing else will do: a tokenizer may treat a text's start otherwise than the rest, and
# a line's end merges with least.
_ANCHOR = "\n"
_PROBE = "It 's  A B ,\nis n't it ?"


class UniversalDrafter:
    """A draft model of any vocabulary continues the text, and the target's tokens for what it wrote are proposed.

    (Universal assisted decoding, as transformers calls it; Timor et al. 2025, "Accelerating LLM Inference with Lossless
    Speculative Decoding Algorithms for Heterogeneous Vocabularies".)

    The draft says what it finds most probable, whatever the sampling: the probability of a text is spread over all ways
    to cut it into tokens, and is not to be had. So the proposal is a chain without a law, and its law is one-hot: a
    token x is accepted with the target's own probability of x. That is exact, greedy or sampled, whatever the draft
    says.

    The draft is asked for as many tokens as those of the limit take at the text's own ratio of the two, and one more:
    where it stops inside of a word, the target's tokens for the part may not be those for the word.

    Special tokens go by their names: where both tokenizers have one of a name it is itself, elsewhere it is plain text.
    But what a tokenizer puts before every text is replaced by what the other does, and so is the token that ends a
    text. Where the context ends inside of a character, what the draft writes must begin with that one's bytes.

    Args:
        target: with its tokenizer.
        draft: with its tokenizer (load it without `target=`, which compares vocabularies).
        policy: what stays in the draft's own cache.

    Raises:
        TokenizerMismatchError: one of the tokenizers is missing, or does not give back the text that it is given.
        ValueError, UnsupportedModelError: as `ModelDrafter`.
    """

    layers = ()

    def __init__(self, target: LM, draft: LM, policy: CachePolicy = KeepAll()) -> None:
        self._target = _Text(target)
        self._draft = _Text(draft)
        self._drafter = ModelDrafter(draft, policy=policy)
        self._translated = functools.lru_cache(_BLOCKS)(self._translate)

    @property
    def forwards(self) -> int:
        return self._drafter.forwards

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tokens = tuple(self._target.without_opening(context.tokens))
        translation, read = self._context(tokens)
        begun = tokens[read:]
        text = [*self._draft.opening, *translation]
        if not text:
            return DraftTree.empty()
        depth = min(limit.depth, limit.nodes)
        most = math.ceil((depth + len(begun)) * len(text) / len(context.tokens)) + 1
        draft_context = Context(text, self._draft.size, Sampling(), context.rng)
        drafted = self._drafter.propose(draft_context, Limit(most, most)).tokens.tolist()
        drafted = drafted[: self._draft.whole(drafted)]
        written = _renamed(self._draft, self._target, self._draft.read(drafted, first=not translation))
        proposed = self._target.write(written.partition(_INCOMPLETE)[0], tokens[max(read - _BEHIND, 0) : read])
        if tuple(proposed[: len(begun)]) != begun:
            return DraftTree.empty()
        proposed = proposed[len(begun) :][:depth]
        # A tokenizer may know tokens for which the model has no row.
        unknown = (place for place, token in enumerate(proposed) if token >= context.vocab_size)
        return DraftTree.chain(torch.tensor(proposed[: next(unknown, depth)], dtype=torch.long))

    def _context(self, tokens: tuple[int, ...]) -> tuple[list[int], int]:
        """The draft's tokens for the text of the target's, and how many of these that is: at the end there may be some
        that only begin a character.

        The text is cut into blocks, of which a step translates only the last anew. Where they end depends on the tokens
        alone, and so then does the translation, whichever blocks are remembered.
        """
        translation: list[int] = []
        read = 0
        while read < len(tokens):
            whole, block = self._translated(tokens[read : read + _BLOCK], tuple(translation[-_BEHIND:]))
            if not whole:
                break
            translation += block
            read += whole
        return translation, read

    def _translate(self, tokens: tuple[int, ...], behind: tuple[int, ...]) -> tuple[int, list[int]]:
        """How many of the target's tokens are whole characters, and the draft's tokens for them behind others."""
        whole = self._target.whole(tokens)
        text = self._target.read(tokens[:whole], first=not behind)
        return whole, self._draft.write(_renamed(self._target, self._draft, text), behind)


class _Text:
    """A model's tokens as text, and text as its tokens.

    Attributes:
        size: the number of its tokens; rows of the model beyond it mean nothing.
        opening: the tokens that its tokenizer puts before every text.
        end: the name of the token that ends a text, if it has one.

    Raises:
        TokenizerMismatchError: there is no tokenizer, or text is lost in it.
    """

    def __init__(self, lm: LM) -> None:
        if lm.tokenizer is None:
            raise TokenizerMismatchError(
                f"{lm.name} has no tokenizer, and models of different vocabularies meet in text alone: load it with its"
                " tokenizer, or choose a pair of one vocabulary"
            )
        self._tokenizer = lm.tokenizer
        self._anchor = self._encode(_ANCHOR)
        probe = self._encode(_PROBE)
        given_back = self.read(self.write(_PROBE, probe), first=False)
        if given_back != _PROBE:
            raise TokenizerMismatchError(
                f"{lm.name} can neither draft by text nor be drafted for: its tokenizer makes {given_back!r} of"
                f" {_PROBE!r}; choose a pair of one vocabulary, or a drafter without a model"
            )
        self.size = len(lm.tokenizer)
        opened = lm.encode(_PROBE)
        self.opening = opened[: opened.index(probe[0])]
        self.end = lm.tokenizer.special_tokens_map.get("eos_token")

    def without_opening(self, tokens: Sequence[int]) -> list[int]:
        """The tokens behind those that the tokenizer put before them, if it did."""
        opened = list(tokens[: len(self.opening)]) == self.opening
        return list(tokens[len(self.opening) if opened else 0 :])

    def whole(self, tokens: Sequence[int]) -> int:
        """How many of the tokens come before the bytes that only begin a character: up to three of its four."""
        ends = range(len(tokens), max(len(tokens) - 4, -1), -1)
        return next((end for end in ends if not self._decode(tokens[:end]).endswith(_INCOMPLETE)), len(tokens))

    def read(self, tokens: Sequence[int], *, first: bool) -> str:
        """The text of tokens, with which a text begins or not: a space before it is lost at the beginning."""
        anchor = [] if first else self._anchor
        return self._decode([*anchor, *tokens])[len(self._decode(anchor)) :]

    def write(self, text: str, behind: Sequence[int]) -> list[int]:
        """The tokens of a text that stands behind others; behind none, it is the beginning.

        It is written together with what it stands behind, as the model has learnt to see words and spaces cut. Only
        where it goes on with a word that is written already does it stand alone.
        """
        for before in (self._decode(behind), _ANCHOR) if behind else ():
            tokens, both = self._encode(before), self._encode(before + text)
            if both[: len(tokens)] == tokens:
                return both[len(tokens) :]
        return self._encode(text)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def _renamed(source: _Text, sink: _Text, text: str) -> str:
    """The text of a source's tokens, in which the token that ends a text is named as the sink names it."""
    return text.replace(source.end, sink.end) if source.end and sink.end else text


def examples(target: LM) -> dict[str, UniversalDrafter]:
    """A target without a tokenizer has none."""
    if target.tokenizer is None:
        return {}
    return {"universal": UniversalDrafter(target, target.subset([0]))}
