"""A drafter with a draft model of another vocabulary: its text is retokenised for the target."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import partial

import torch

from specdecode.controllers.base import Limit
from specdecode.core.errors import TokenizerMismatchError
from specdecode.core.sampling import Sampling
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context
from specdecode.drafters.model import ModelDrafter
from specdecode.models.arguments import check_lm
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll

# Number of target tokens in a block, which is translated as a whole. It is small enough to translate one block in each
# step. It is large enough that the ends of blocks, which no draft token can cross, hardly matter.
_BLOCK_TOKENS = 256
# Number of translated blocks in the cache.
_CACHED_BLOCKS = 1024
# Number of tokens put before a text when it is tokenized: enough for a word that the text may continue.
_PRECEDING_TOKENS = 8
# The decoded form of a broken character's bytes.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Text put before a text without preceding text: a tokenizer may treat the start of a text specially. A newline is least
# likely to merge with the following text.
_ANCHOR = "\n"
_PROBE = "It 's  A B ,\nis n't it ?"


class UniversalDrafter:
    """A drafter with a draft model of any vocabulary: it proposes the target's tokens for the draft's text.

    transformers calls this universal assisted decoding. It is a method of Timor et al. 2025, "Accelerating LLM
    Inference with Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies".

    The draft decodes greedily, even if the target samples: the probability of a text is spread over all its
    tokenizations, and cannot be computed. So the proposal is a deterministic chain with one-hot distributions, and a
    token x is accepted with the target's probability of x. This is exact for greedy decoding and for sampling.

    The number of draft tokens is the limit times the text's ratio of draft tokens to target tokens, plus one. The
    additional token is needed because the draft may stop within a word: the target's tokens for a part of a word may
    differ from its tokens for the word.

    A special token is matched by its name. A name in both tokenizers is the same special token in both; other names are
    plain text. The opening tokens of one tokenizer are replaced by the other's opening tokens, and so is the token that
    ends a text. If the context ends within a character, the draft's text must begin with the bytes of this character
    that the context has.

    Args:
        target: the target, with its tokenizer.
        draft: the draft model, with its tokenizer. Load it without `target=`, which compares vocabularies.
        policy: chooses the tokens that stay in the draft's own cache.

    Raises:
        TokenizerMismatchError: a tokenizer is missing, or changes a text that is encoded and decoded again.
        ValueError: as `ModelDrafter`.
        UnsupportedModelError: as `ModelDrafter`.
    """

    layers = ()

    def __init__(self, target: LM, draft: LM, policy: CachePolicy = KeepAll()) -> None:
        check_lm("target", target)
        check_lm("draft", draft)
        self._target = _TokenCodec(target)
        self._draft = _TokenCodec(draft)
        self._drafter = ModelDrafter(draft, policy=policy)
        # A cache of a method would hold the drafter, and with it the draft's KV cache, until garbage is collected.
        self._translated = functools.lru_cache(_CACHED_BLOCKS)(partial(_translate, self._target, self._draft))

    @property
    def forwards(self) -> int:
        return self._drafter.forwards

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        if context.first:
            return DraftTree.empty()
        tokens = tuple(self._target.without_opening(context.tokens))
        translation, translated = self._context(tokens)
        incomplete = tokens[translated:]
        draft_tokens = [*self._draft.opening, *translation]
        if not draft_tokens:
            return DraftTree.empty()
        depth, ratio = min(limit.depth, limit.nodes), len(draft_tokens) / len(context.tokens)
        length = math.ceil((depth + len(incomplete)) * ratio) + 1
        length_limit = None if context.length_limit is None else math.ceil(context.length_limit * ratio)
        draft_context = Context(draft_tokens, self._draft.size, Sampling(), context.rng, length_limit=length_limit)
        drafted = self._drafter.propose(draft_context, Limit(length, length)).tokens.tolist()
        drafted = drafted[: self._draft.complete(drafted)]
        text = _with_end_of(self._target, self._draft, self._draft.decode(drafted, first=not translation))
        preceding = tokens[max(translated - _PRECEDING_TOKENS, 0) : translated]
        proposed = self._target.encode(text.partition(_BROKEN)[0], preceding)
        if tuple(proposed[: len(incomplete)]) != incomplete:
            return DraftTree.empty()
        proposed = proposed[len(incomplete) :][:depth]
        # A tokenizer may have tokens without a row in the model's output.
        rowless = (place for place, token in enumerate(proposed) if token >= context.vocab_size)
        return DraftTree.chain(torch.tensor(proposed[: next(rowless, depth)], dtype=torch.long))

    def _context(self, tokens: tuple[int, ...]) -> tuple[list[int], int]:
        """Translate the target's tokens into the draft's.

        The text is cut into blocks, and a step translates only the last block again. The ends of the blocks depend on
        the tokens alone, so the translation does not depend on the cache.

        Returns:
            The draft's tokens, and the number of target tokens that they stand for. The remaining target tokens are the
                beginning of a character.
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


class _TokenCodec:
    """A translator between text and a model's tokens, also in the middle of a text.

    Args:
        lm: the model.

    Attributes:
        size: number of tokens of the tokenizer. Further rows of the model's output have no meaning.
        opening: tokens that the tokenizer puts before every text.
        end: name of the token that ends a text; None if there is none.

    Raises:
        TokenizerMismatchError: there is no tokenizer, or it changes a text that is encoded and decoded again.
    """

    def __init__(self, lm: LM) -> None:
        if lm.tokenizer is None:
            raise TokenizerMismatchError(
                f"{lm.name} has no tokenizer, but models of different vocabularies can exchange only text: load it with"
                " its tokenizer, or choose a pair with one vocabulary"
            )
        self._tokenizer = lm.tokenizer
        self._spelling = lm.spelling
        self._leading_space = self._spelling.text(self._tokenize("a")).removesuffix("a")
        probe = self._tokenize(_PROBE)
        round_trip = self.decode(self.encode(_PROBE, probe), first=False)
        if round_trip != _PROBE:
            raise TokenizerMismatchError(
                f"{lm.name} can neither draft by text nor be drafted for: its tokenizer returns {round_trip!r} for"
                f" {_PROBE!r}; choose a pair with one vocabulary, or a drafter without a model"
            )
        self.size = len(lm.tokenizer)
        opened = lm.encode(_PROBE)
        self.opening = opened[: opened.index(probe[0])]
        self.end = lm.tokenizer.special_tokens_map.get("eos_token")

    def without_opening(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens without the tokenizer's opening tokens, if they begin with these."""
        opened = list(tokens[: len(self.opening)]) == self.opening
        return list(tokens[len(self.opening) if opened else 0 :])

    def complete(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens up to the last complete character. Up to three bytes after it may begin
        another."""
        reader = self._spelling.reader()
        complete = 0
        for place, token in enumerate(tokens, start=1):
            reader.read(token)
            if not reader.pending:
                complete = place
        return complete

    def decode(self, tokens: Sequence[int], *, first: bool) -> str:
        """Return the text of tokens.

        Args:
            tokens: token ids.
            first: whether the tokens begin a text. Then the space that the tokenizer adds is left out.
        """
        text = self._spelling.text(tokens)
        return text.removeprefix(self._leading_space) if first else text

    def encode(self, text: str, preceding: Sequence[int]) -> list[int]:
        """Return the tokens of a text after other tokens.

        The text is tokenized together with the preceding text, so that words and spaces are cut as in training. It is
        tokenized alone only if it continues a word that is already tokenized.

        Args:
            text: the text to encode.
            preceding: tokens before the text; empty if it is the beginning.
        """
        for before in (self.decode(preceding, first=True), _ANCHOR) if preceding else ():
            tokens, both = self._tokenize(before), self._tokenize(before + text)
            if both[: len(tokens)] == tokens:
                return both[len(tokens) :]
        return self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def _translate(
    target: _TokenCodec, draft: _TokenCodec, tokens: tuple[int, ...], preceding: tuple[int, ...]
) -> tuple[int, list[int]]:
    """Translate the target's tokens as far as they are complete characters.

    Args:
        target, draft: their tokenizers.
        tokens: target tokens of one block.
        preceding: draft tokens of the text before the block.

    Returns:
        The number of translated target tokens, and the draft's tokens for them.
    """
    complete = target.complete(tokens)
    text = target.decode(tokens[:complete], first=not preceding)
    return complete, draft.encode(_with_end_of(draft, target, text), preceding)


def _with_end_of(sink: _TokenCodec, source: _TokenCodec, text: str) -> str:
    """Return a text of the source, with the name of its end token replaced by the sink's name of the end token."""
    return text.replace(source.end, sink.end) if source.end and sink.end else text


def examples(target: LM) -> dict[str, UniversalDrafter]:
    """Return no example for a target without a tokenizer."""
    if target.tokenizer is None:
        return {}
    return {"universal": UniversalDrafter(target, target.subset([0]))}
