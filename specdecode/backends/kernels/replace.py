"""Replacement of a model's modules by those that run the kernels."""

from __future__ import annotations

from torch import nn

from specdecode.backends.kernels import linear, norms


def replace_layers(model: nn.Module) -> str:
    """Replace the linear layers and the norms of a model that the kernels compute. Return a note on it.

    All other modules stay as they are. The new modules share the parameters of the old.
    """
    made: dict[nn.Module, nn.Module] = {}
    left = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            hooked = child._forward_hooks or child._forward_pre_hooks  # the kernels would pass them over
            if child not in made and not hooked and linear.takes(child):
                made[child] = linear.FewRowsLinear(child)
            if child not in made and not hooked and norms.takes(child):
                made[child] = norms.KernelRMSNorm(child)
            if child in made:  # two modules may share it
                setattr(parent, name, made[child])
            elif not isinstance(child, nn.Embedding):
                left += any(weight.dim() > 1 for weight in child.parameters(recurse=False))
    products = sum(isinstance(module, linear.FewRowsLinear) for module in made.values())
    note = f"{products} linear layers and {len(made) - products} norms by kernels"
    return note + (f", {left} other matrices as they are" if left else "")
