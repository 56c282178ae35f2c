"""A drafter that is a model of another vocabulary: it proposes text, retokenised for the target."""

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

# Target tokens that are translated at once: few enough to do so in every step, and enough that it hardly matters that
# no token of the draft reaches across the end of a block.
_BLOCK_TOKENS = 256
# Translated blocks that are cached.
_CACHED_BLOCKS = 1024
# Tokens put before a text when it is tokenized: enough for a word that it may continue.
_PRECEDING_TOKENS = 8
# What the bytes of a broken character decode to.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Text put before a text that has no other: a tokenizer may treat the start of a text specially, and a newline merges
# least with what follows.
_ANCHOR = "\n"
_PROBE = "It 's  A B ,\nis n't it ?"


class UniversalDrafter:
    """Propose the target's tokens for the text that a draft model of any vocabulary writes.

    (Universal assisted decoding, as transformers calls it; Timor et al. 2025, "Accelerating LLM Inference with Lossless
    Speculative Decoding Algorithms for Heterogeneous Vocabularies".)

    The draft decodes greedily, whatever the sampling: the probability of a text is spread over all its tokenizations,
    and cannot be computed. So the proposal is a deterministic chain, whose distributions are one-hot: a token x is
    accepted with the target's probability of x. That is exact, greedy or sampled, whatever the draft writes.

    The number of draft tokens is the limit times the text's ratio of draft tokens to target tokens, and one more: if
    the draft stops within a word, the target's tokens for the part may differ from those for the word.

    Special tokens are matched by name: a name that both tokenizers have is that token in both, other names are plain
    text. But each tokenizer's opening tokens are replaced by the other's, and so is the token that ends a text. If the
    context ends within a character, the draft's text must begin with the bytes of that character.

    Args:
        target: with its tokenizer.
        draft: with its tokenizer (load it without `target=`, which compares vocabularies).
        policy: evicts from the draft's own cache.

    Raises:
        TokenizerMismatchError: one of the tokenizers is missing, or does not give back the text that it is given.
        ValueError, UnsupportedModelError: as `ModelDrafter`.
    """

    layers = ()

    def __init__(self, target: LM, draft: LM, policy: CachePolicy = KeepAll()) -> None:
        self._target = _TokenCodec(target)
        self._draft = _TokenCodec(draft)
        self._drafter = ModelDrafter(draft, policy=policy)
        self._translated = functools.lru_cache(_CACHED_BLOCKS)(self._translate)

    @property
    def forwards(self) -> int:
        return self._drafter.forwards

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tokens = tuple(self._target.without_opening(context.tokens))
        translation, translated = self._context(tokens)
        incomplete = tokens[translated:]
        draft_tokens = [*self._draft.opening, *translation]
        if not draft_tokens:
            return DraftTree.empty()
        depth = min(limit.depth, limit.nodes)
        length = math.ceil((depth + len(incomplete)) * len(draft_tokens) / len(context.tokens)) + 1
        draft_context = Context(draft_tokens, self._draft.size, Sampling(), context.rng)
        drafted = self._drafter.propose(draft_context, Limit(length, length)).tokens.tolist()
        drafted = drafted[: self._draft.complete(drafted)]
        text = _with_end_of(self._target, self._draft, self._draft.decode(drafted, first=not translation))
        preceding = tokens[max(translated - _PRECEDING_TOKENS, 0) : translated]
        proposed = self._target.encode(text.partition(_BROKEN)[0], preceding)
        if tuple(proposed[: len(incomplete)]) != incomplete:
            return DraftTree.empty()
        proposed = proposed[len(incomplete) :][:depth]
        # A tokenizer may have tokens for which the model has no row.
        rowless = (place for place, token in enumerate(proposed) if token >= context.vocab_size)
        return DraftTree.chain(torch.tensor(proposed[: next(rowless, depth)], dtype=torch.long))

    def _context(self, tokens: tuple[int, ...]) -> tuple[list[int], int]:
        """Translate the target's tokens into the draft's.

        The text is cut into blocks, and a step translates only the last one anew. The tokens alone decide where the
        blocks end, so the translation does not depend on which blocks are cached.

        Returns:
            The draft's tokens, and how many of the target's tokens they stand for. The others, at the end, only begin a
            character.
        """
        translation: list[int] = []
        translated = 0
        while translated < len(tokens):
            complete, block = self._translated(
                tokens[translated : translated + _BLOCK_TOKENS], tuple(translation[-_PRECEDING_TOKENS:])
            )
            if not complete:
                break
            translation += block
            translated += complete
        return translation, translated

    def _translate(self, tokens: tuple[int, ...], preceding: tuple[int, ...]) -> tuple[int, list[int]]:
        """Translate the target's tokens as far as they are complete characters.

        Returns:
            How many tokens those are, and the draft's tokens for them after its preceding ones.
        """
        complete = self._target.complete(tokens)
        text = self._target.decode(tokens[:complete], first=not preceding)
        return complete, self._draft.encode(_with_end_of(self._draft, self._target, text), preceding)


class _TokenCodec:
    """Decode a model's tokens to text, and encode text as its tokens, in the middle of a text too.

    Attributes:
        size: number of tokens. Rows of the model beyond it mean nothing.
        opening: tokens that the tokenizer puts before every text.
        end: name of the token that ends a text, if there is one.

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
        self._spelling = lm.spelling
        self._leading_space = self._spelling.text(self._tokenize("a")).removesuffix("a")
        probe = self._tokenize(_PROBE)
        round_trip = self.decode(self.encode(_PROBE, probe), first=False)
        if round_trip != _PROBE:
            raise TokenizerMismatchError(
                f"{lm.name} can neither draft by text nor be drafted for: its tokenizer makes {round_trip!r} of"
                f" {_PROBE!r}; choose a pair of one vocabulary, or a drafter without a model"
            )
        self.size = len(lm.tokenizer)
        opened = lm.encode(_PROBE)
        self.opening = opened[: opened.index(probe[0])]
        self.end = lm.tokenizer.special_tokens_map.get("eos_token")

    def without_opening(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens after the tokenizer's opening tokens, if they begin with those."""
        opened = list(tokens[: len(self.opening)]) == self.opening
        return list(tokens[len(self.opening) if opened else 0 :])

    def complete(self, tokens: Sequence[int]) -> int:
        """Return how many of the tokens are complete characters: up to three bytes may begin another."""
        reader = self._spelling.reader()
        complete = 0
        for place, token in enumerate(tokens, start=1):
            reader.read(token)
            if not reader.pending:
                complete = place
        return complete

    def decode(self, tokens: Sequence[int], *, first: bool) -> str:
        """Return the text of tokens. If they are the first of a text, the space that the tokenizer adds is left out."""
        text = self._spelling.text(tokens)
        return text.removeprefix(self._leading_space) if first else text

    def encode(self, text: str, preceding: Sequence[int]) -> list[int]:
        """Return the tokens of a text after other tokens; with none, the text is a beginning.

        The text is tokenized together with the preceding one, so that words and spaces are cut as the model has learnt
        them. It is tokenized alone only if it continues a word that is already tokenized.
        """
        for before in (self.decode(preceding, first=True), _ANCHOR) if preceding else ():
            tokens, both = self._tokenize(before), self._tokenize(before + text)
            if both[: len(tokens)] == tokens:
                return both[len(tokens) :]
        return self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def _with_end_of(sink: _TokenCodec, source: _TokenCodec, text: str) -> str:
    """Return a text of the source in which the token that ends a text has the sink's name."""
    return text.replace(source.end, sink.end) if source.end and sink.end else text


def examples(target: LM) -> dict[str, UniversalDrafter]:
    """Return no example for a target without a tokenizer."""
    if target.tokenizer is None:
        return {}
    return {"universal": UniversalDrafter(target, target.subset([0]))}
