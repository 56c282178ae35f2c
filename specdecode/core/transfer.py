"""Copies between the host and a device, without waiting where that need not be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device.

    A copy to a GPU does not wait for the GPU's queued work: what uses the copy is queued behind it. A copy to the host
    waits, as nothing else keeps the host from reading what has not arrived yet.
    """
    return tensor.to(device, non_blocking=_need_not_wait(device))


def write(target: Tensor, source: Tensor) -> None:
    """Copy into a tensor, which may lie on another device. It waits where `moved` does."""
    target.copy_(source, non_blocking=_need_not_wait(target.device))


def _need_not_wait(to: torch.device) -> bool:
    return to.type != "cpu"


def picked(tensor: Tensor, indices: Sequence[int], dim: int = 0) -> Tensor:
    """Return the entries of a dimension at these indices, without waiting for a GPU: indexing by a list does."""
    return tensor.index_select(dim, moved(torch.tensor(indices, dtype=torch.long), tensor.device))
