"""The number of the reference arm's runs between the arms of a block, adapted to the drift of the machine's speed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

LEAST_PARTS, MOST_PARTS = 2, 8
_BLOCKS = 6
"""Number of blocks after which the number of parts is computed anew."""


@dataclass(slots=True)
class Drift:
    """The drift of the machine's speed, estimated from the reference arm's runs alone. No other arm's time is used.

    Let v be the variance of a run's logarithm. The difference of two runs has the variance 2 v. The difference of a run
    and the mean of two others has the variance 1.5 v. A random walk adds d to the first, between the two ends of a
    block. It adds d / 2p to the second, between neighbours in a block of p parts.

    Attributes:
        parts: number of parts of a block's other arms, with runs of the reference arm between: so many that d / 2p is
            below v.
        changes: squared logarithms of the reference arm's first time over its last, for the last few blocks.
        noise: squared logarithms of the reference arm's middle time over those of its runs right before and after.
    """

    parts: int = LEAST_PARTS
    changes: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def add(self, change: float, noise: float) -> None:
        """Add a block's two logarithms. Recompute `parts` after every `_BLOCKS` blocks."""
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
