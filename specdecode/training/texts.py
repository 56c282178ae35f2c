"""Texts for the training of a draft head: passages of corpora, and continuations that the target writes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from specdecode.core.sampling import Sampling, checked_choice
from specdecode.drafters.base import common_prefix
from specdecode.evals.data import NAMES, Sample, documents
from specdecode.models.lm import LM

CHAT = "chat"
"""Conversations whose question and answer the target writes, from the beginning of its chat template (Xu et al. 2024,
"Magpie")."""

ASK = "ask"
"""Questions about passages of the corpora, in the target's chat template, with the target's answers. Many real answers
repeat words of the question."""

_QUESTIONS = (
    "Summarize the following text.",
    "Translate the following text into German.",
    "Translate the following text into French.",
    "List all names, numbers and dates in the following text.",
    "Explain the following to a beginner, and quote the passages that you explain.",
    "Rewrite the following text, and correct its mistakes.",
    "What is the following about? Answer in whole sentences.",
    "Repeat the following text word by word.",
    "Write three questions about the following text, and answer each from the text.",
    "What can be concluded from the following? Think step by step.",
)

# Tokens of a passage that the target continues.
_PROMPT_TOKENS = 32
# Low enough for meaningful texts, high enough for different texts.
_TEMPERATURE = 0.8


class Texts:
    """A source of texts of one length, drawn by number: the same number gives the same texts.

    Args:
        target: model that tokenises the texts and continues some of them.
        parts: data sets with documents, see `evals.data`, and CHAT and ASK. All have the same share; a name given twice
            has two shares.
        length: tokens of every text.
        own: share of the corpus texts that the target continues from the 33rd token on.
        held_out: number of documents of each data set that are left out, the first in their order.
        seed: seed of the draws.

    Attributes:
        origins: origin of each data set, by name.
        digest: digest of all documents.
        held_out: the documents that are left out, by data set.

    Raises:
        ValueError: an unknown or unavailable data set, too few documents, no chat template, or an impossible number.
    """

    def __init__(
        self, target: LM, parts: Sequence[str], length: int, *, own: float = 0.5, held_out: int = 20, seed: int = 0
    ) -> None:
        if not _PROMPT_TOKENS < length <= target.context_length:
            raise ValueError(
                f"length is {length}: a text has more than {_PROMPT_TOKENS} tokens, and at most the"
                f" {target.context_length} that the context of {target.name} holds"
            )
        if not 0.0 <= own <= 1.0:
            raise ValueError(f"own is {own}: a share is from 0 to 1")
        if unknown := [part for part in parts if part not in (*NAMES, CHAT, ASK)]:
            raise ValueError(f"no data set is named {unknown[0]!r}: choose from {', '.join((*NAMES, CHAT, ASK))}")
        if ASK in parts and not {*parts} - {CHAT, ASK}:
            raise ValueError(f"{ASK} asks about passages of data sets with documents: name at least one beside it")
        self._target, self._parts, self._length = target, tuple(parts), length
        self._own, self._seed = own, seed
        self._opening, self._closing = _chat_frame(target) if {CHAT, ASK} & {*parts} else ([], [])
        self._questions = [target.encode(f"{question}\n\n") for question in _QUESTIONS] if ASK in parts else []
        around = len(self._opening) + max(map(len, self._questions), default=0) + len(self._closing)
        if ASK in parts and length // 2 < around + _PROMPT_TOKENS:
            raise ValueError(
                f"length is {length}: a question about a passage fills half of a text, and needs at least"
                f" {around + _PROMPT_TOKENS} tokens"
            )
        self.origins: dict[str, str] = {}
        contents = hashlib.sha256()
        self.held_out: dict[str, list[Sample]] = {}
        self._corpora: dict[str, list[list[int]]] = {}
        # Cumulative lengths of the documents of each corpus: passages are drawn in proportion to length.
        self._ends: dict[str, list[int]] = {}
        for part in sorted({*parts} - {CHAT, ASK}):
            in_order, self.origins[part] = documents(part)
            contents.update(b"\0".join([part.encode(), *(document.text.encode() for document in in_order)]))
            self.held_out[part] = in_order[:held_out]
            encoded = (target.encode(document.text) for document in in_order[held_out:])
            self._corpora[part] = [tokens for tokens in encoded if len(tokens) >= length]
            if not self._corpora[part]:
                raise ValueError(
                    f"{part} has no documents of {length} tokens beyond the {held_out} that are held out: use a"
                    " smaller length, hold out fewer, or use another data set"
                )
            self._ends[part] = list(accumulate(map(len, self._corpora[part])))
        self.digest = contents.hexdigest()[:16]

    def draw(self, number: int, count: int, tell: Callable[[str], None] = lambda doing: None) -> list[list[int]]:
        """Return `count` texts. The texts of the next number follow these.

        Args:
            number: number of these texts, from 0.
            count: how many texts.
            tell: called with a name of the current work, while the target writes.
        """
        rng = random.Random(f"{self._seed}/{number}")
        corpora = sorted(self._corpora)
        complete: list[list[int]] = []
        # Beginnings of texts that the target continues, by kind: all beginnings of a kind have the same length.
        begun: dict[str, list[list[int]]] = {}
        for place in range(number * count, (number + 1) * count):
            part = self._parts[place % len(self._parts)]
            if part == CHAT:
                begun.setdefault(CHAT, []).append(self._opening)
            elif part == ASK:
                begun.setdefault(ASK, []).append(self._question(self._passage(rng.choice(corpora), rng), rng))
            else:
                text = self._passage(part, rng)
                if rng.random() < self._own:
                    begun.setdefault("corpora", []).append(text[:_PROMPT_TOKENS])
                else:
                    complete.append(text)
        for beginnings in begun.values():
            complete += self._continued(beginnings, number, tell)
        return complete

    def _passage(self, corpus: str, rng: random.Random) -> list[int]:
        """Return a passage with the length of a text, from a random place in a corpus."""
        [document] = rng.choices(self._corpora[corpus], cum_weights=self._ends[corpus])
        start = rng.randrange(len(document) - self._length + 1)
        return document[start : start + self._length]

    def _question(self, passage: Sequence[int], rng: random.Random) -> list[int]:
        """Return a question about the beginning of a passage. Both together fill half of a text."""
        question = [*self._opening, *rng.choice(self._questions)]
        return [*question, *passage[: self._length // 2 - len(question) - len(self._closing)], *self._closing]

    @torch.inference_mode()
    def _continued(self, begun: Sequence[Sequence[int]], number: int, tell: Callable[[str], None]) -> list[list[int]]:
        """Let the target continue texts to the full length by sampling. Greedy text soon repeats itself, and a head
        learns nothing from repetitions. End-of-text tokens do not stop a text. transformers decodes here: all rows have
        the same length."""
        model = self._target.model
        ids = torch.tensor(begun, device=self._target.device)
        # transformers fills unset fields from the model's configuration.
        usual, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
        configuration = GenerationConfig(
            max_new_tokens=self._length - ids.shape[1], pad_token_id=0, eos_token_id=None, do_sample=False
        )
        sampling = Sampling(_TEMPERATURE, seed=number + (self._seed << 32))

        def tell_token(token: int) -> None:
            tell(f"the target continues {len(begun)} texts, token {token} of {self._length - ids.shape[1]}")

        try:
            written = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=configuration,
                logits_processor=LogitsProcessorList([Draw(sampling, tell_token)]),
            )
        finally:
            model.generation_config = usual
        texts: list[list[int]] = written.tolist()
        return texts


class Draw(LogitsProcessor):
    """A processor that samples one token per row, and excludes all others. (The sampling of transformers draws a random
    number for every token of the vocabulary, which needs half of the decoding time.)

    Args:
        sampling: the rule of the draws.
        tell: called with the number of each drawn token, from 1.
    """

    def __init__(self, sampling: Sampling, tell: Callable[[int], None] = lambda token: None) -> None:
        self._sampling, self._rng = sampling, sampling.rng()
        self._tell, self._drawn = tell, 0

    def __call__(self, input_ids: Int[Tensor, "b n"], scores: Float[Tensor, "b V"]) -> Float[Tensor, "b V"]:
        chosen = self._rng.draw(self._sampling.probs(scores))
        checked_choice(int(chosen.min()))
        self._drawn += 1
        self._tell(self._drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _chat_frame(target: LM) -> tuple[list[int], list[int]]:
    """Return the chat template's tokens before and after a user's message: the tokens that two messages share."""
    one, other = (target.encode(question, chat=True) for question in ("A", "5"))
    return one[: common_prefix(one, other)], one[len(one) - common_prefix(one[::-1], other[::-1]) :]
