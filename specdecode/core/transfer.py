"""Copies between the host and a device."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device.

    A copy to a GPU does not wait for the GPU's queued work: what uses the copy is queued behind it. A copy to the host
    waits, as nothing else keeps the host from reading what has not arrived yet.
    """
    return tensor.to(device, non_blocking=device.type != "cpu")
