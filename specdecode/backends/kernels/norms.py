"""RMSNorm by one kernel. (PyTorch's own LayerNorm is one already, and transformers' RMSNorm is several.)"""

from __future__ import annotations

from inspect import signature
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn

from specdecode.backends.kernels import TYPES, KernelModule


@triton.jit
@no_type_check  # Triton compiles the source, so that checks of types cannot wrap it
def _normalise(inputs, weight, output, width, epsilon, WIDTH: tl.constexpr):
    """Normalise one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    state = tl.load(inputs + row * width + at, mask=inside, other=0.0).to(tl.float32)
    state = state / tl.sqrt(tl.sum(state * state, 0) / width + epsilon)
    # Rounded before the product, as transformers does.
    state = state.to(output.dtype.element_ty).to(tl.float32)
    scaled = state * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * width + at, scaled.to(output.dtype.element_ty), mask=inside)


def rms_norm(inputs: Float[Tensor, "*rows n"], weight: Float[Tensor, " n"], epsilon: float) -> Float[Tensor, "*rows n"]:
    """Divide each row by the root of its mean square, and multiply by a weight (RMSNorm: Zhang and Sennrich 2019).

    Args:
        inputs: the rows, in one of `kernels.TYPES`.
        weight: a factor for each component, in the same type.
        epsilon: added to the mean square.
    """
    width = inputs.shape[-1]
    output = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    if len(output.view(-1)):
        with torch.cuda.device_of(inputs):
            _normalise[(output.numel() // width,)](
                inputs.contiguous(), weight, output, width, epsilon, WIDTH=triton.next_power_of_2(width)
            )
    return output


def rms_norm_reference(
    inputs: Float[Tensor, "*rows n"], weight: Float[Tensor, " n"], epsilon: float
) -> Float[Tensor, "*rows n"]:
    """Normalise as `rms_norm` does, in PyTorch."""
    state = inputs.float()
    state = state * torch.rsqrt(state.square().mean(-1, keepdim=True) + epsilon)
    return weight * state.to(inputs.dtype)


class KernelRMSNorm(KernelModule):
    """An RMSNorm by the kernel. Other types run the norm itself."""

    def forward(self, states: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        if states.dtype != self.weight.dtype:
            normalised: Tensor = self.layer(states)
            return normalised
        return rms_norm(states, self.weight, self.variance_epsilon)


@torch.no_grad()
def takes(norm: nn.Module) -> bool:
    """Return whether a module is the RMSNorm of most models: by its parts, and by its result for two rows."""
    weight = _weight(norm)
    epsilon = vars(norm).get("variance_epsilon")
    if weight is None or weight.dtype not in TYPES or not isinstance(epsilon, float):
        return False
    if len(signature(norm.forward).parameters) > 1:  # a gate, too
        return False
    rows = torch.linspace(-1, 2, 2 * len(weight), device=weight.device).to(weight.dtype).view(1, 2, -1)
    expected = rms_norm_reference(rows, weight, epsilon)
    return torch.allclose(norm(rows), expected, rtol=4 * torch.finfo(weight.dtype).eps)


def _weight(norm: nn.Module) -> nn.Parameter | None:
    """Return the weight of a module that has nothing else: a vector, and no modules; None for any other module."""
    parameters = dict(norm.named_parameters())
    weight = parameters.get("weight")
    return weight if len(parameters) == 1 and weight is not None and weight.dim() == 1 else None
