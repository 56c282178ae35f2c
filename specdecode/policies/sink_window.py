"""A cache policy that keeps the first tokens and the latest."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots
from specdecode.policies.base import bounds


class SinkWindow:
    """A policy that keeps attention sinks and a window over the latest tokens (StreamingLLM, Xiao et al. 2024).

    Args:
        max_len: most committed tokens in the cache.
        sinks: number of tokens at the start that always stay.
        trigger: share of `max_len` beyond which the oldest tokens of the window are evicted.
        interval: tokens between evictions; by default as many as fit above the trigger, so that one eviction frees many
            slots.

    Raises:
        ValueError: a trigger outside (0, 1], an interval below 1, or no room for a window.
    """

    def __init__(self, max_len: int, sinks: int = 4, trigger: float = 0.9, interval: int | None = None) -> None:
        self.pinned = sinks
        self.keeps, self.interval = bounds(max_len, trigger, interval, sinks)
        self.reads_attention = False

    def keep(self, slots: Slots) -> Int[Tensor, " m"]:
        everywhere = torch.arange(slots.length, device=slots.device)
        window = min(self.keeps, slots.length) - self.pinned
        return torch.cat([everywhere[: self.pinned], everywhere[slots.length - window :]])


def examples() -> dict[str, SinkWindow]:
    return {"sink-window": SinkWindow(16), "sink-window-often": SinkWindow(11, sinks=1, trigger=1.0, interval=3)}
