"""Processes that decode one model together: each holds a part of every weight, and all make the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a model's weights (tensor parallelism).

    Every process runs the whole decoding loop. What they compute from tensors is the same in all of them, so they
    choose the same tokens. What depends on a clock or on chance is not: there the first process decides.

    Attributes:
        group: the processes, as PyTorch knows them; None for a model that one process holds.
    """

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else self.group.size()

    def agreed(self, value: T) -> T:
        """Return the first process's value in all of them. Every process must call this at the same place."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self.group)
        return values[0]


def ranks_of(model: nn.Module) -> Ranks:
    """Return the processes among which a model's weights are split."""
    split: Any = next((weight for weight in model.parameters() if isinstance(weight, DTensor)), None)
    return Ranks() if split is None else Ranks(split.device_mesh.get_group())
