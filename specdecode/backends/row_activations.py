"""Activations whose result for a row does not depend, to the last bit, on the other rows of a forward.

PyTorch splits an elementwise operation over more than `SERIAL` elements among its threads. In each part it computes the
last few elements by another function than the rest, and SiLU or GELU may then differ in the last bit. Where the parts
end depends on the number of rows. So these activations take at most `SERIAL` elements at a time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

SERIAL = 16384
"""The most elements that every kernel of PyTorch computes in one thread. The kernel of GELU splits any larger number,
others split from twice as many on (`GELU_MIN_ELEMENTS_FOR_MULTI_THREADING` and `at::internal::GRAIN_SIZE`)."""

_VECTOR = 32
"""The elements that a kernel computes at once, on any processor; a rest of fewer is computed by another function."""

_OF_TORCH = (nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh)


class RowActivation(nn.Module):
    """An elementwise activation over rows, computed in pieces of rows.

    Args:
        activation: the activation, without parameters.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, states: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        width = states.shape[-1]
        rows = states.reshape(-1, width)
        most = max(1, SERIAL // width) if width % _VECTOR == 0 else 1
        if len(rows) <= most or torch.compiler.is_compiling():
            whole: Tensor = self.activation(states)
            return whole
        return torch.cat([self.activation(piece) for piece in rows.split(most)]).view(states.shape)


def separate_activations(model: nn.Module) -> None:
    """Wrap each activation of a model in a `RowActivation`."""
    for parent in list(model.modules()):
        if isinstance(parent, RowActivation):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, _OF_TORCH) or type(child).__module__ == "transformers.activations":
                setattr(parent, name, RowActivation(child))
