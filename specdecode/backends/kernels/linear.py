"""Products of few rows with the weights of a linear layer: in the layer's type, or 8-bit integers with a scale for each
output (W8A16)."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from specdecode.backends.kernels import TYPES, KernelModule, integer_weights

MOST_ROWS = 16
"""Rows of a program: those that one matrix instruction of a GPU takes at least. Over more rows each program reads the
weights again, so PyTorch's own product is faster."""

# Bytes of a row of inputs that a program reads at a time, and its outputs: more if there are many outputs, whose
# programs keep a GPU busy all the same.
_BYTES, _OUTPUTS, _LARGER_OUTPUTS, _MANY = 512, 16, 32, 8192


@triton.jit(do_not_specialize=["rows"])
@no_type_check  # Triton compiles the source, so that checks of types cannot wrap it
def _multiply(
    inputs, weight, scales, bias, output, rows, in_features, out_features, OUT: tl.constexpr, IN: tl.constexpr
):
    """Multiply 16 rows with a part of the outputs' weights."""
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    in_row = row < rows
    in_out = out < out_features
    product = tl.zeros([16, OUT], tl.float32)
    for begin in range(0, in_features, IN):
        at = begin + tl.arange(0, IN)
        inside = at < in_features
        left = tl.load(
            inputs + row.to(tl.int64)[:, None] * in_features + at[None, :],
            mask=in_row[:, None] & inside[None, :],
            other=0.0,
        )
        # An output head may have more weights than 32 bits can count.
        right = tl.load(
            weight + out.to(tl.int64)[None, :] * in_features + at[:, None],
            mask=inside[:, None] & in_out[None, :],
            other=0,
        )
        if scales is not None:
            right = right.to(tl.float32)  # the interpreter converts integers to no type of 16 bits
        product += tl.dot(left, right.to(left.dtype), input_precision="ieee")
    if scales is not None:
        product *= tl.load(scales + out, mask=in_out, other=0.0)[None, :]
    if bias is not None:
        product += tl.load(bias + out, mask=in_out, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output + row.to(tl.int64)[:, None] * out_features + out[None, :],
        product.to(output.dtype.element_ty),
        mask=in_row[:, None] & in_out[None, :],
    )


def multiply(
    inputs: Float[Tensor, "rows n"],
    weight: Shaped[Tensor, "m n"],
    scales: Float[Tensor, " m"] | None,
    bias: Float[Tensor, " m"] | None,
) -> Float[Tensor, "rows m"]:
    """Multiply rows with a weight, scale each output, and add the bias. The sums and the scaling are in float32. The
    result of a row does not depend on the other rows, to the last bit.

    Args:
        inputs: rows in one of `kernels.TYPES`. All tensors are on one device.
        weight: in the type of the inputs, or 8-bit integers. Its rows are contiguous.
        scales: a factor for each output, in float32; None for 1.
        bias: the bias; None for 0.
    """
    rows, in_features = inputs.shape
    out_features = weight.shape[0]
    output = inputs.new_empty(rows, out_features)
    outputs = _LARGER_OUTPUTS if out_features >= _MANY else _OUTPUTS
    with torch.cuda.device_of(inputs):
        _multiply[(triton.cdiv(out_features, outputs), triton.cdiv(rows, MOST_ROWS))](
            inputs.contiguous(),
            weight,
            scales,
            bias,
            output,
            rows,
            in_features,
            out_features,
            OUT=outputs,
            IN=_BYTES // inputs.itemsize,
        )
    return output


@torch.library.custom_op(
    "specdecode::multiply",
    mutates_args=(),
    schema="(Tensor inputs, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor",
)
def _multiply_in_compiled_code(
    inputs: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None
) -> Float[Tensor, "rows m"]:
    """Multiply as `multiply` does. The compiler calls this operation as it is."""
    return multiply(inputs, weight, scales, bias)


@_multiply_in_compiled_code.register_fake
def _product_like(inputs: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])  # `len` would fix the number of rows


def multiply_reference(
    inputs: Float[Tensor, "rows n"],
    weight: Shaped[Tensor, "m n"],
    scales: Float[Tensor, " m"] | None,
    bias: Float[Tensor, " m"] | None,
) -> Float[Tensor, "rows m"]:
    """Multiply as `multiply` does, in PyTorch."""
    product = nn.functional.linear(inputs.float(), weight.float())
    if scales is not None:
        product = product * scales
    return (product if bias is None else product + bias.float()).to(inputs.dtype)


class KernelLinear(KernelModule):
    """A linear layer that multiplies by the kernel. More rows, and other types, run the layer itself.

    Args:
        layer: a layer that `takes` accepts.
        most_rows: the most rows that the kernel multiplies; any number if None.
    """

    def __init__(self, layer: nn.Module, most_rows: int | None = MOST_ROWS) -> None:
        super().__init__(layer)
        self._most_rows = most_rows

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        rows = inputs.reshape(-1, inputs.shape[-1])
        weights = _weights(self.layer)
        assert weights is not None
        weight, scales = weights
        output: Tensor
        fits = rows.dtype in TYPES and (scales is not None or rows.dtype == weight.dtype)
        if fits and 0 < len(rows) <= (self._most_rows or len(rows)):
            product = _multiply_in_compiled_code if torch.compiler.is_compiling() else multiply
            output = product(rows, weight, scales, self.bias).view(*inputs.shape[:-1], -1)
        else:
            output = self.layer(inputs)
        return output


def takes(layer: nn.Module) -> bool:
    """Return whether the kernel multiplies with a layer's weights: those of a plain linear layer in one of
    `kernels.TYPES`, or the 8-bit integers of `models.quantized_linear.Int8Linear`."""
    weights = _weights(layer)
    if weights is None:
        return False
    weight, scales = weights
    plain = type(weight) is nn.Parameter and weight.is_contiguous()
    return plain and (weight.dtype in TYPES if scales is None else weight.dtype == torch.int8)


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return a layer's weight, and its scales if it has integers; None for another layer."""
    return (layer.weight, None) if type(layer) is nn.Linear else integer_weights(layer)
