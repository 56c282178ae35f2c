"""Processes that decode with one model together: each holds a part of every weight, and all make the same steps."""

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

    Every process runs the whole decoding loop. All of them compute the same values from tensors, so they choose the
    same tokens. Clocks and random seeds differ between processes: there the value of the first process counts.

    Attributes:
        group: PyTorch's group of these processes; None for a model that one process holds.
    """

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else self.group.size()

    def agreed(self, value: T) -> T:
        """Return the first process's value in every process.

        All processes must call this at the same place in the program.

        Args:
            value: this process's value, which can be pickled.
        """
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self.group)
        return values[0]


def ranks_of(model: nn.Module) -> Ranks:
    """Return the processes among which a model's weights are split; one process if they are not split."""
    split: Any = next((weight for weight in model.parameters() if isinstance(weight, DTensor)), None)
    return Ranks() if split is None else Ranks(split.device_mesh.get_group())
