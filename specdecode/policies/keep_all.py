"""The cache policy of a full cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots


@dataclass(frozen=True, slots=True)
class KeepAll:
    """A policy that keeps all slots."""

    interval: int = 0
    keeps: int = 0
    reads_attention: bool = False

    def keep(self, slots: Slots) -> Int[Tensor, " m"]:
        return torch.arange(slots.length, device=slots.device)


def examples() -> dict[str, KeepAll]:
    return {"keep-all": KeepAll()}
