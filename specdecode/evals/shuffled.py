"""A negative control of the quality suite: a sink window in random order."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots
from specdecode.policies.base import CachePolicy


class Shuffled:
    """A policy that puts the slots of a window in random order: a negative control for models with rotary positions.

    Args:
        window: policy that chooses the slots that stay.
    """

    def __init__(self, window: CachePolicy) -> None:
        self._window = window
        self.interval, self.keeps = window.interval, window.keeps
        self.reads_attention = False

    def keep(self, slots: Slots) -> Int[Tensor, " m"]:
        kept = self._window.keep(slots)
        generator = torch.Generator().manual_seed(slots.committed)
        return kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
