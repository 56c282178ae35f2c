"""Kernels in Triton for forwards of few rows, each beside a reference in PyTorch.

Triton is imported by the modules of this package, and not by the package itself. They are imported only where a backend
needs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

BY_KERNEL = "triton_over_slots"
"""The name under which transformers knows `attention.attend_over_slots` as an attention function."""

BY_KERNEL_ROWS = "triton_by_rows"
"""The name under which transformers knows `rows.attend_each_row` as an attention function."""

TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The types that the kernels take. All of them sum in float32."""


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on any device: for tests, and many times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(backend: str, device: torch.device) -> str | None:
    """Return why a backend cannot run the kernels on a device, and what to do; None if it can."""
    if device.type != "cuda" and not interpreted():
        return (
            f"the backend {backend} is for a GPU: use compile, packed or eager on {device.type}, or set"
            " TRITON_INTERPRET=1 to test it there"
        )
    if find_spec("triton") is None:
        return f"the backend {backend} needs the package triton, which is not installed: pip install triton"
    return None


class KernelModule(nn.Module):
    """A module that computes in another way, mostly by a kernel, what another module computes. It has the attributes of
    that module, which some models read.

    Args:
        layer: the other module.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__.get("_modules", {}).get("layer")
        if layer is None:  # it is being built or copied
            raise AttributeError(name)
        return layer if name == "layer" else getattr(layer, name)


def integer_weights(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the 8-bit integers and the scales of a layer that has them, as `models.quantized_linear.Int8Linear`.

    (Its class belongs to a room that imports from this one.)
    """
    parameters = dict(layer.named_parameters(recurse=False))
    # Not by a comparison of sets, which the compiler of PyTorch 2.11 does not know.
    there = "integers" in parameters and "scales" in parameters
    return (parameters["integers"], parameters["scales"]) if there else None


def replace_modules(
    model: nn.Module, replacement: Callable[[nn.Module], KernelModule | None]
) -> tuple[dict[nn.Module, KernelModule], int]:
    """Replace modules in place.

    Args:
        model: the model or the head.
        replacement: returns the module to take in place of one; None to leave it.

    Returns:
        The new modules by the old, and the number of other modules with a matrix that is no embedding.
    """
    made: dict[nn.Module, KernelModule] = {}
    left = 0
    for parent in [module for module in model.modules() if not isinstance(module, KernelModule)]:
        for name, child in list(parent.named_children()):
            hooked = child._forward_hooks or child._forward_pre_hooks  # a replacement would pass them over
            if child not in made and not hooked and (replaced := replacement(child)) is not None:
                made[child] = replaced
            if child in made:  # two modules may share it
                setattr(parent, name, made[child])
            elif not isinstance(child, nn.Embedding):
                left += any(weight.dim() > 1 for weight in child.parameters(recurse=False))
    return made, left


def restore_layers(model: nn.Module) -> None:
    """Put the modules back, in place, that modules with kernels have replaced."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, KernelModule):
                setattr(parent, name, child.layer)
