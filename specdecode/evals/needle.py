"""Measure retrieval with a needle in a haystack: a number in a long text, and a question about it at the end."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specdecode.drafters.base import common_prefix
from specdecode.evals.perplexity import DecodePath
from specdecode.models.lm import LM

_NEEDLE = "The pass key is {0}. Remember it: {0} is the pass key."
_QUESTION = "What is the pass key? The pass key is"
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")
# Longer sentences are tables or programs.
_LONGEST_SENTENCE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Needle:
    """One text with a needle in it.

    Attributes:
        length: requested tokens; prompt and answer together are shorter by at most a sentence.
        depth: share of the text before the needle.
        prompt: token ids up to the beginning of the answer.
        answer: token ids of the number.
    """

    length: int
    depth: float
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The result of one decode path for one needle.

    Attributes:
        logprob: log-probability of the answer, in nats.
        ranks: for each token of the answer, the number of tokens that were more probable at its place.
        exact: whether greedy decoding writes the answer.
    """

    logprob: float
    ranks: list[int]
    exact: bool


def bury(lm: LM, texts: Sequence[str], length: int, depth: float) -> Needle:
    """Put a needle between the sentences of texts.

    Args:
        lm: model whose tokens are counted.
        texts: source of the sentences, which are taken in order, from a random one on, or the next that fits.
        length: tokens of prompt and answer together.
        depth: share of the sentences before the needle, from 0 to 1.

    Raises:
        ValueError: a depth outside [0, 1], a length too small for the needle, or a length that the texts do not fill.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}: a share of the text is from 0 to 1")
    rng = random.Random(f"0 {length} {depth}")
    number = str(rng.randrange(10_000, 100_000))
    needle = _NEEDLE.format(number)
    sentences = [
        sentence
        for text in texts
        for sentence in _END_OF_SENTENCE.split(" ".join(text.split()))
        if 0 < len(sentence) <= _LONGEST_SENTENCE_CHARACTERS
    ]
    first = rng.randrange(len(sentences)) if sentences else 0
    room = length - len(lm.encode(f"{needle} {_QUESTION} {number}"))
    hay: list[str] = []
    full = False
    for sentence in [*sentences[first:], *sentences[:first]]:
        size = len(lm.encode(f" {sentence}"))
        if size <= room:
            room -= size
            hay.append(sentence)
        elif full := bool(hay):
            break
    if not full:
        raise ValueError(f"no needle can be put into {length} tokens of these texts: choose another length")
    place = round(depth * len(hay))
    question = " ".join([*hay[:place], needle, *hay[place:], _QUESTION])
    prompt, whole = lm.encode(question), lm.encode(f"{question} {number}")
    # The first token of the number may include letters of the question. The answer begins with that token.
    start = common_prefix(prompt, whole)
    return Needle(length, depth, whole[:start], whole[start:])


def look_for(path: DecodePath, needle: Needle) -> Retrieval:
    """Read the prompt as usual, and decode the answer with teacher forcing.

    Greedy decoding writes the answer if and only if each token of the answer is the most probable at its place.
    """
    steps = path.forced_steps([*needle.prompt, *needle.answer], len(needle.prompt))
    log_probs = torch.cat([step.logits.double().log_softmax(-1) for step in steps])
    answer = torch.tensor(needle.answer, device=log_probs.device)
    of_answer = log_probs.gather(1, answer[:, None])
    return Retrieval(
        logprob=of_answer.sum().item(),
        ranks=(log_probs > of_answer).sum(1).tolist(),
        exact=bool((log_probs.argmax(-1) == answer).all()),
    )
