"""Turn logits into the distribution that a token is drawn from; and hold the one source of randomness."""

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

    It draws uniform numbers on the CPU in float64, so a seed means the same on every device. A test replaces this class
    by an enumeration of all outcomes.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator()
        self._generator.manual_seed(seed)

    def coin(self, probability: float | Float[Tensor, ""]) -> bool:
        """Return True with this probability; anything from 1 up is certain."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item() < float(probability)

    def draw(self, distribution: Float[Tensor, "*rows V"]) -> Int[Tensor, "*rows"]:
        """Draw one index from each row, by inversion of its cumulative sum; rows need not be normalised.

        An entry of probability zero is never drawn: the cumulative sum does not rise there. A row without mass, or with
        NaN in it, gives -1.
        """
        uniform = moved(
            torch.rand(distribution.shape[:-1], generator=self._generator, dtype=torch.float64), distribution.device
        )
        cumulative = distribution.double().cumsum(-1)
        mass = cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * mass, right=True)
        # A product that is rounded up to the whole mass points behind the last entry.
        return drawn.clamp(max=distribution.shape[-1] - 1).where(mass > 0, -1).squeeze(-1)


def most_probable(logits: Float[Tensor, "*rows V"]) -> Int[Tensor, "*rows"]:
    """Return the index of the largest entry of each row; -1 where a row has NaN in it, or nothing above -inf."""
    largest = logits.max(-1)
    return largest.indices.where(largest.values > -torch.inf, -1)


def checked_choice(token: int) -> int:
    """Return a token that was drawn, or is the most probable one.

    Raises:
        SpecDecodeError: it is -1, as its distribution has no mass or is not finite.
    """
    if token < 0:
        raise SpecDecodeError(
            "the model's logits are NaN, infinite or all -inf here, so that no token can be chosen: run it in another"
            " dtype, such as float32 or bfloat16, or check its weights"
        )
    return token


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from the target's logits.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding.
        top_k: keep the k most probable tokens (and any that tie with the last of them); 0 keeps all.
        top_p: keep the fewest most probable tokens whose mass reaches this share (nucleus sampling, Holtzman et al.
            2020); 1 keeps all. Applied after top_k.
        seed: of the generator; None draws one.

    Raises:
        ValueError: a value outside its range.
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
        """Return the source of randomness of one generation; processes that decode together get the same."""
        seed = self.seed
        if seed is None:
            seed = ranks.agreed(torch.Generator().seed())
        return Rng(seed)

    def probs(self, logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """Return the distribution that a token is drawn from: after temperature, then top_k, then top_p.

        It is float32 at least. Under greedy decoding it is the plain softmax: not the distribution of the choice, which
        is one-hot, but what a drafter ranks its proposals by.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.greedy:
            return scores.softmax(-1)
        # With the largest at zero, none overflows. What no temperature can be divided by is as good as greedy.
        largest = scores.amax(-1, keepdim=True)
        scores = (scores - largest) / max(self.temperature, torch.finfo(scores.dtype).tiny)
        if 0 < self.top_k < scores.shape[-1]:
            lowest = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        if self.top_p < 1.0:
            ranked, order = scores.sort(descending=True)
            mass = ranked.softmax(-1)
            # A token goes when the ones before it already reach top_p; the first one always stays.
            beyond = (mass.cumsum(-1) - mass) >= self.top_p
            scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        return scores.softmax(-1)
