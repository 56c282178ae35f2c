"""Replacement of a model's modules by those that run the kernels."""

from __future__ import annotations

from torch import nn

from specdecode.backends.grouped_attention import GroupedAttention
from specdecode.backends.kernels import KernelModule, attention, integer_weights, linear, norms, replace_modules


def replace_layers(model: nn.Module, most_rows: int | None = linear.MOST_ROWS) -> str:
    """Replace the modules of a model or a draft head that the kernels compute. Return a note on its layers.

    All other modules stay as they are. The new modules share the parameters of the old.

    Args:
        model: the model or the head.
        most_rows: the most rows that the kernel multiplies with a linear layer; any number if None.
    """
    made, left = replace_modules(model, lambda child: _by_kernel(child, most_rows))
    products, normed = (
        sum(isinstance(module, kind) for module in made.values()) for kind in (linear.KernelLinear, norms.KernelRMSNorm)
    )
    note = f"{products} linear layers and {normed} norms by kernels"
    return note + (f", {left} other matrices as they are" if left else "")


def replace_integer_layers(model: nn.Module) -> None:
    """Replace the linear layers of a model that have 8-bit weights, in place: any other product of few rows writes
    their weights out in 16 bits."""
    replace_modules(
        model, lambda child: None if integer_weights(child) is None else _by_kernel(child, linear.MOST_ROWS)
    )


def _by_kernel(module: nn.Module, most_rows: int | None) -> KernelModule | None:
    """Return the module by a kernel; None if no kernel computes it."""
    if linear.takes(module):
        return linear.KernelLinear(module, most_rows)
    if norms.takes(module):
        return norms.KernelRMSNorm(module)
    return attention.KernelAttention(module) if isinstance(module, GroupedAttention) else None


def inexact_module(model: nn.Module) -> str | None:
    """Return a module whose result for a row may depend on the other rows, in words; None if there is none.

    Embeddings and PyTorch's LayerNorm, a kernel of one row, are exact. So are replaced modules.
    """
    replaced = {module.layer for module in model.modules() if isinstance(module, KernelModule)}
    for name, module in model.named_modules():
        exact = module in replaced or isinstance(module, nn.Embedding | nn.LayerNorm)
        if not exact and next(module.parameters(recurse=False), None) is not None:
            return f"{name} is a {type(module).__name__}"
    return None
