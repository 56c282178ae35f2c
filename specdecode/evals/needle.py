"""A needle in a haystack: a number told somewhere in a long text, and asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specdecode.drafters.base import common_prefix
from specdecode.evals.perplexity import DecodePath
from specdecode.models.lm import LM

_TOLD = "The pass key is {0}. Remember it: {0} is the pass key."
_ASKED = "What is the pass key? The pass key is"
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_LONGEST_SENTENCE = 300  # characters: what is longer is a table or a program


@dataclass(frozen=True, slots=True)
class Needle:
    """One text with a needle in it.

    Attributes:
        length: tokens that were asked for; prompt and answer have a sentence less at most.
        depth: share of the text that stands before the needle.
        prompt: token ids, up to where the answer begins.
        answer: token ids of the number.
    """

    length: int
    depth: float
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Found:
    """What one way to decode answered.

    Attributes:
        logprob: of the answer, in nats.
        ranks: of each of its tokens, how many others were more probable at its place.
        exact: whether greedy decoding writes it.
    """

    logprob: float
    ranks: list[int]
    exact: bool


def bury(lm: LM, texts: Sequence[str], length: int, depth: float, seed: int = 0) -> Needle:
    """Put a needle between the sentences of texts.

    Args:
        lm: in whose tokens lengths are counted.
        texts: to hide it in; their sentences are taken one after the other, from one that the seed chooses on.
        length: tokens of the prompt and the answer.
        depth: share of the sentences that stand before the needle, from 0 to 1.
        seed: of the number and of the beginning.

    Raises:
        ValueError: a depth outside [0, 1], or a length that has no room for the needle or that the texts do not fill.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}: a share of the text is from 0 to 1")
    rng = random.Random(f"{seed} {length} {depth}")
    number = str(rng.randrange(10_000, 100_000))
    told = _TOLD.format(number)
    sentences = [
        sentence
        for text in texts
        for sentence in _END_OF_SENTENCE.split(" ".join(text.split()))
        if 0 < len(sentence) <= _LONGEST_SENTENCE
    ]
    first = rng.randrange(len(sentences)) if sentences else 0
    room = length - len(lm.encode(f"{told} {_ASKED} {number}"))
    hay: list[str] = []
    for sentence in [*sentences[first:], *sentences[:first]]:
        room -= len(lm.encode(f" {sentence}"))
        if room < 0:
            break
        hay.append(sentence)
    if room >= 0 or not hay:
        raise ValueError(f"no needle can be buried in {length} tokens of these texts: ask for fewer, or for more")
    place = round(depth * len(hay))
    asked = " ".join([*hay[:place], told, *hay[place:], _ASKED])
    prompt, whole = lm.encode(asked), lm.encode(f"{asked} {number}")
    # Where the number's first token takes letters of the question, the answer begins with it.
    start = common_prefix(prompt, whole)
    return Needle(length, depth, whole[:start], whole[start:])


def look_for(path: DecodePath, needle: Needle) -> Found:
    """Read the prompt, as any prompt is read, and decode the answer, teacher-forced.

    Greedy decoding writes the answer if and only if each of its tokens is the most probable one after those before it.
    """
    steps = path.follow([*needle.prompt, *needle.answer], len(needle.prompt))
    laws = torch.cat([step.logits.double().log_softmax(-1) for step in steps])
    answer = torch.tensor(needle.answer, device=laws.device)
    own = laws.gather(1, answer[:, None])
    return Found(
        logprob=own.sum().item(),
        ranks=(laws > own).sum(1).tolist(),
        exact=bool((laws.argmax(-1) == answer).all()),
    )
