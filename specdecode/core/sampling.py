"""The distribution that a token is drawn from, computed from logits; and the only source of randomness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.core.errors import SpecDecodeError
from specdecode.core.ranks import Ranks
from specdecode.core.transfer import moved


class Rng:
    """The source of all randomness of one generation: biased coins, and draws from a distribution.

    It draws uniform numbers on the CPU in float64, so a seed gives the same numbers on every device. Tests replace this
    class by an enumeration of all outcomes.

    Args:
        seed: seed of the generator.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator()
        self._generator.manual_seed(seed)

    def coin(self, probability: float | Float[Tensor, ""]) -> bool:
        """Return True with this probability. A value of 1 or more always gives True."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item() < float(probability)

    def draw(self, distribution: Float[Tensor, "*rows V"]) -> Int[Tensor, "*rows"]:
        """Draw one index from each row, by inversion of the row's cumulative sum.

        An entry of probability zero is never drawn, because the cumulative sum does not rise there.

        Args:
            distribution: rows that need not be normalised.

        Returns:
            The index for each row; -1 for a row that sums to zero or contains NaN.
        """
        uniform = moved(
            torch.rand(distribution.shape[:-1], generator=self._generator, dtype=torch.float64), distribution.device
        )
        cumulative = distribution.double().cumsum(-1)
        mass = cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * mass, right=True)
        # If rounding raises the product to the whole mass, the index lies behind the last entry.
        return drawn.clamp(max=distribution.shape[-1] - 1).where(mass > 0, -1).squeeze(-1)


def most_probable(logits: Float[Tensor, "*rows V"]) -> Int[Tensor, "*rows"]:
    """Return the index of the largest entry of each row; -1 for a row that contains NaN, or only -inf."""
    largest = logits.max(-1)
    return largest.indices.where(largest.values > -torch.inf, -1)


def checked_choice(token: int) -> int:
    """Return a chosen token unchanged, after a check that it is valid.

    Args:
        token: the result of `Rng.draw` or `most_probable`.

    Raises:
        SpecDecodeError: the token is -1, because its distribution has no mass or is not finite.
    """
    if token < 0:
        raise SpecDecodeError(
            "the model's logits are NaN, infinite or all -inf here, so that no token can be chosen: run it in another"
            " dtype, such as float32 or bfloat16, or check its weights"
        )
    return token


@dataclass(frozen=True, slots=True)
class Sampling:
    """The rule that chooses the next token from the target's logits.

    Attributes:
        temperature: divisor of the logits, 0 or above; 0 is greedy decoding.
        top_k: number of most probable tokens to keep, with all ties of the last; 0 keeps all tokens.
        top_p: probability mass above 0 and at most 1. The fewest most probable tokens that reach it are kept (nucleus
            sampling, Holtzman et al. 2020); 1 keeps all tokens. Applied after top_k.
        seed: seed of the random generator; None draws a seed.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (keep all tokens) or a positive number")
        if not (0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def rng(self, ranks: Ranks = Ranks()) -> Rng:
        """Return the source of randomness of one generation.

        Args:
            ranks: the processes that decode together. All of them get the same seed.
        """
        seed = self.seed
        if seed is None:
            seed = ranks.agreed(torch.Generator().seed())
        return Rng(seed)

    def probs(self, logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """Return the distribution that a token is drawn from: temperature is applied first, then top_k, then top_p.

        Under greedy decoding the result is the plain softmax. A drafter ranks its proposals by it; the choice itself is
        the most probable token.

        Args:
            logits: logits of a model, in any floating-point type.

        Returns:
            Probabilities, in float64 for float64 logits, else in float32.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.greedy:
            return scores.softmax(-1)
        # With the largest score at zero, none overflows. A temperature below the least normal number is raised to it:
        # sampling is as good as greedy there.
        largest = scores.amax(-1, keepdim=True)
        scores = (scores - largest) / max(self.temperature, torch.finfo(scores.dtype).tiny)
        if 0 < self.top_k < scores.shape[-1]:
            lowest = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        if self.top_p < 1.0:
            ranked, order = scores.sort(descending=True)
            mass = ranked.softmax(-1)
            # A token is dropped if the tokens before it already reach top_p. The first token always stays.
            beyond = (mass.cumsum(-1) - mass) >= self.top_p
            scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        return scores.softmax(-1)
