"""Parts that the modules of draft heads share: the store of keys and values, rotary positions and norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm

Store = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""A function that stores the keys and values, each [b, heads, n, dim], of the tokens that are read. Its arguments are
the keys, the values and the number of the head's layer. It returns all keys and values that these tokens may attend
to."""


def rotated(
    x: Float[Tensor, "b heads n dim"], cos: Float[Tensor, "*_ n dim"], sin: Float[Tensor, "*_ n dim"]
) -> Float[Tensor, "b heads n dim"]:
    """Rotate each component of an attention head's first half with its partner in the second half (Su et al. 2021)."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply an RMS norm in the type of `x`. In autocast training `x` has 16 bits, and there are no kernels for mixed
    types."""
    assert isinstance(norm, nn.RMSNorm)
    return rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
