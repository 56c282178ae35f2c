"""Copies between the host and a device, without waiting where that is safe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device.

    A copy to a GPU does not wait for the GPU's queued work, since later work on the copy is queued behind it. A copy to
    the host waits: otherwise the host could read the values before they have arrived.
    """
    return tensor.to(device, non_blocking=_need_not_wait(device))


class Copies(dict[torch.device, Tensor]):
    """A tensor on each device that is asked for. A copy is made once, and none on the tensor's own device.

    Args:
        tensor: the tensor to copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__({tensor.device: tensor})
        self._tensor = tensor

    def __missing__(self, device: torch.device) -> Tensor:
        self[device] = copy = moved(self._tensor, device)
        return copy


def write(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target`, which may be on another device. It waits in the same cases as `moved`."""
    target.copy_(source, non_blocking=_need_not_wait(target.device))


def _need_not_wait(to: torch.device) -> bool:
    return to.type != "cpu"


def picked(tensor: Tensor, indices: Sequence[int], dim: int = 0) -> Tensor:
    """Return the entries of a dimension at these indices. Unlike indexing by a list, this does not wait for a GPU."""
    return tensor.index_select(dim, moved(torch.tensor(indices, dtype=torch.long), tensor.device))
