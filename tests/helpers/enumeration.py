"""Exact distributions instead of statistics: every outcome of every random decision, with its weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from specdecode.core.sampling import Rng


class BranchRng(Rng):
    """A generator that takes prescribed branches at its first decisions, and the first branch at all later ones.

    Weights may be floats or fractions. Branches of weight zero do not exist.
    """

    def __init__(self, prefix: list[int]) -> None:
        self.prefix = prefix
        self.taken: list[tuple[int, int]] = []
        self.weight: Any = 1

    def _decide(self, weights: list[Any]) -> int:
        options = [i for i, weight in enumerate(weights) if weight > 0]
        if not options:  # A row without mass: `Rng.draw` returns its last entry.
            return len(weights) - 1
        at = len(self.taken)
        branch = self.prefix[at] if at < len(self.prefix) else 0
        self.taken.append((branch, len(options)))
        weight, total = weights[options[branch]], sum(weights)
        # Dividing by 1 would turn whole numbers into floats.
        self.weight *= weight if total == 1 else weight / total
        return options[branch]

    def coin(self, probability: Any) -> bool:
        heads = min(probability.item() if isinstance(probability, torch.Tensor) else probability, 1)
        return self._decide([1 - heads, heads]) == 1

    def draw(self, distribution: Any) -> torch.Tensor:
        """Draw from a tensor of one or more rows, or from one row of fractions."""
        if distribution.ndim == 1:
            return torch.tensor(self._decide(distribution.tolist()))
        rows = [self._decide(row) for row in distribution.tolist()]
        return torch.tensor(rows, dtype=torch.long, device=distribution.device)

    def next_prefix(self) -> list[int] | None:
        """Return the decisions of the next run in lexicographic order, or None after the last run."""
        taken = self.taken
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken = taken[:-1]
        return [*(branch for branch, _ in taken[:-1]), taken[-1][0] + 1] if taken else None


def distribution_of(run: Callable[[BranchRng], Hashable]) -> dict[Any, Any]:
    """Return the probability of each result of a random procedure."""
    distribution: dict[Any, Any] = defaultdict(int)
    prefix: list[int] | None = []
    while prefix is not None:
        rng = BranchRng(prefix)
        distribution[run(rng)] += rng.weight
        prefix = rng.next_prefix()
    return dict(distribution)
