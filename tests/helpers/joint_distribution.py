"""The distribution of the first sampled tokens of a model so small that all texts can be enumerated."""

from __future__ import annotations

import functools
import itertools

from specdecode import LM, Sampling
from tests.helpers.lean import lean
from tests.helpers.models import logits, small

VOCABULARY = 5
# Without the last token, so that a draft of a smaller vocabulary has something to propose.
PROMPT = (3, 1, 2, 1, 2, 1)


@functools.cache
def enumerated_model(seed: int, vocabulary: int = VOCABULARY, layers: int = 1) -> LM:
    return lean(small(seed, vocab_size=vocabulary, num_hidden_layers=layers))


@functools.cache
def target_distribution(sampling: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """Compute the probability of each continuation of PROMPT with a given length, by forwards without a cache."""

    def next_distribution(text: tuple[int, ...]) -> list[float]:
        return sampling.probs(logits(enumerated_model(0, layers=2).model, PROMPT + text)[-1]).tolist()

    distributions = {
        text: next_distribution(text) for n in range(length) for text in itertools.product(range(VOCABULARY), repeat=n)
    }
    distribution = {}
    for text in itertools.product(range(VOCABULARY), repeat=length):
        weight = 1.0
        for i, token in enumerate(text):
            weight *= distributions[text[:i]][token]
        distribution[text] = weight
    return distribution


def distance(distribution: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    """Return the largest difference between two distributions' probabilities of one text."""
    return max(abs(distribution.get(text, 0.0) - other.get(text, 0.0)) for text in distribution.keys() | other.keys())
