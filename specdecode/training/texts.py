"""Texts to train a draft head on: corpora, and what the target itself goes on to write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import GenerationConfig

from specdecode.drafters.base import common_prefix
from specdecode.evals.data import NAMES, Sample, documents
from specdecode.lm import LM

CHAT = "chat"
"""Conversations that the target writes by itself, question and answer, from the beginning of its chat template (Xu et
al. 2024, "Magpie")."""

# Tokens of a corpus that the target continues.
_PROMPT = 32
# Low enough for the model's own text to stay text, high enough for no two of them to be the same.
_TEMPERATURE = 0.8


class Texts:
    """Texts of one length, drawn by number: the same number gives the same texts.

    Args:
        target: whose tokens they are of, and who writes.
        parts: data sets with documents, see `evals.data`, and CHAT; all get the same share, one that is named twice
            twice of it.
        length: of every text, in tokens.
        own: share of the corpus texts that are the target's from the 33rd token on.
        held_out: so many documents of each data set, the first in their order, are left out.
        seed: of the draws.

    Attributes:
        origins: of the data sets, by name.
        held_out: the documents that were left out, by data set.

    Raises:
        ValueError: a data set that is not known or not at hand, too few documents, no chat template, or a number that
            cannot be.
    """

    def __init__(
        self, target: LM, parts: Sequence[str], length: int, *, own: float = 0.5, held_out: int = 20, seed: int = 0
    ) -> None:
        if not _PROMPT < length <= target.context_length:
            raise ValueError(
                f"length is {length}: a text has more than {_PROMPT} tokens, and at most the {target.context_length}"
                f" that the context of {target.name} holds"
            )
        if not 0.0 <= own <= 1.0:
            raise ValueError(f"own is {own}: a share is from 0 to 1")
        if unknown := [part for part in parts if part not in (*NAMES, CHAT)]:
            raise ValueError(f"no data set is named {unknown[0]!r}: choose from {', '.join((*NAMES, CHAT))}")
        self._target, self._parts, self._length = target, tuple(parts), length
        self._own, self._seed = own, seed
        self._opening = _opening(target) if CHAT in parts else []
        self.origins: dict[str, str] = {}
        self.held_out: dict[str, list[Sample]] = {}
        self._corpora: dict[str, list[list[int]]] = {}
        # Of each corpus the tokens up to the end of each document: a long one is drawn from more often.
        self._ends: dict[str, list[int]] = {}
        for part in sorted({*parts} - {CHAT}):
            found, self.origins[part] = documents(part)
            self.held_out[part] = found[:held_out]
            encoded = (target.encode(document.text) for document in found[held_out:])
            self._corpora[part] = [tokens for tokens in encoded if len(tokens) >= length]
            if not self._corpora[part]:
                raise ValueError(
                    f"{part} has no documents of {length} tokens beyond the {held_out} that are held out: take a"
                    " smaller length, hold out fewer, or take another data set"
                )
            self._ends[part] = list(accumulate(map(len, self._corpora[part])))

    def draw(self, number: int, count: int) -> list[list[int]]:
        """`count` texts; the next number goes on where this one ends."""
        rng = random.Random(f"{self._seed}/{number}")
        whole: list[list[int]] = []
        begun: list[list[int]] = []
        chats = 0
        for place in range(number * count, (number + 1) * count):
            part = self._parts[place % len(self._parts)]
            if part == CHAT:
                chats += 1
                continue
            [document] = rng.choices(self._corpora[part], cum_weights=self._ends[part])
            start = rng.randrange(len(document) - self._length + 1)
            text = document[start : start + self._length]
            if rng.random() < self._own:
                begun.append(text[:_PROMPT])
            else:
                whole.append(text)
        whole += self._continued(begun, number, sampled=False)
        whole += self._continued([self._opening] * chats, number, sampled=True)
        return whole

    @torch.inference_mode()
    def _continued(self, begun: Sequence[Sequence[int]], number: int, *, sampled: bool) -> list[list[int]]:
        """The texts, written on by the target to the full length: greedily, where different beginnings make different
        texts. Ends of text are tokens like others. Transformers' own decoding serves, since all rows are of one length,
        and nothing is compared with it."""
        if not begun:
            return []
        model = self._target.model
        ids = torch.tensor(begun, device=self._target.device)
        # What a configuration leaves open, transformers takes from the model.
        usual, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
        configuration = GenerationConfig(
            max_new_tokens=self._length - ids.shape[1],
            pad_token_id=0,
            eos_token_id=None,
            **({"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0} if sampled else {"do_sample": False}),
        )
        try:
            with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
                torch.manual_seed(number + (self._seed << 32))
                written = model.generate(  # type: ignore[operator]
                    ids, attention_mask=torch.ones_like(ids), generation_config=configuration
                )
        finally:
            model.generation_config = usual
        texts: list[list[int]] = written.tolist()
        return texts


def _opening(target: LM) -> list[int]:
    """What stands before the first words of a user: that which two questions have in common."""
    one, other = (target.encode(question, chat=True) for question in ("A", "5"))
    return one[: common_prefix(one, other)]
