"""How often the baseline must be measured between the arms: as often as the machine's speed drifts."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

LEAST_PARTS, MOST_PARTS = 2, 8
_BLOCKS = 6
"""How many blocks tell whether there must be more parts."""


@dataclass(slots=True)
class Drift:
    """What the baseline's runs in the blocks so far tell of the machine. No other arm's time is looked at.

    Runs whose logarithms have the variance v differ by 2 v, and each from the mean of two others by 1.5 v. A random
    walk that adds d to the first, between the ends of a block of p parts, adds d / 2p to the second, between
    neighbours.

    Attributes:
        parts: how many parts the baseline is to part the other arms of a block into: so many that d / 2p is below v.
        changes: squares of the logarithm of the baseline's first time over its last, of the last few blocks.
        noise: squares of the logarithm of its time in the middle over that of its runs right before and after.
    """

    parts: int = LEAST_PARTS
    changes: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def add(self, change: float, noise: float) -> None:
        """Take a block into account."""
        self.changes.append(change**2)
        self.noise.append(noise**2)
        if len(self.changes) == _BLOCKS:
            self.parts = self._wanted()
            self.changes, self.noise = [], []

    def _wanted(self) -> int:
        change, noise = statistics.fmean(self.changes), statistics.fmean(self.noise)
        white = (noise - change / (2 * self.parts)) / (1.5 - 1 / self.parts)
        walk = max(0.0, change - 2 * white)
        if walk >= 2 * MOST_PARTS * white:
            return MOST_PARTS if walk else LEAST_PARTS
        return max(LEAST_PARTS, round(walk / (2 * white)))
