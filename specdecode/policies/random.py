"""A cache policy that keeps random tokens: the negative control of all others."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots
from specdecode.core.transfer import moved
from specdecode.policies.base import bounds


class Random:
    """A policy that keeps random tokens: the negative control of every quality measurement.

    Args:
        max_len: most committed tokens in the cache.
        trigger: share of `max_len` beyond which tokens are evicted.
        interval: tokens between evictions; by default as many as fit above the trigger.
        seed: decides the choice, together with the committed length.

    Raises:
        ValueError: a trigger outside (0, 1], or an interval below 1.
    """

    def __init__(self, max_len: int, trigger: float = 0.9, interval: int | None = None, seed: int = 0) -> None:
        self.seed = seed
        self.keeps, self.interval = bounds(max_len, trigger, interval, 0)
        self.reads_attention = False

    def keep(self, slots: Slots) -> Int[Tensor, " m"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + slots.committed)
        chosen = torch.randperm(slots.length, generator=generator)[: self.keeps]
        return moved(chosen.sort().values, slots.device)


def examples() -> dict[str, Random]:
    return {"random": Random(16)}
