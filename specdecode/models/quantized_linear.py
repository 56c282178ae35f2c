"""Linear layers with 8-bit and 4-bit weights.

On a CPU the result of a row does not depend on the other rows of a product, to the last bit. So speculation over these
layers gives the tokens of plain decoding over them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdecode.backends.layouts import ONEDNN, packed_layouts
from specdecode.backends.merged import joined_bias, joined_weight
from specdecode.backends.row_attention import rows_of_text

GROUP = 32
"""Inputs of a group of 4-bit weights: the weights from them to one output share a grid."""

_LEVELS = 16  # of 4 bits
# The 4-bit kernel multiplies by n - 8, and adds the middle of the group.
_MIDDLE = 8
# PyTorch packs 4-bit weights for a number of outputs that is a multiple of this.
_OUTPUTS = 16
# In float16 activations are divided by this, and products multiplied: an integer then acts as a weight of at most 1.
# Without it a real model exceeds 65,504, the largest float16 (SmolLM2-135M by a factor of 8).
_FLOAT16_FACTOR = 128
# Over at least this many rows of a text, a product with float32 weights is faster than PyTorch's kernel for 8-bit
# weights, even if it is the only product with these weights in float32.
_LEAST_TEXT = 64


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights.

    A weight is an integer from -128 to 127 times the scale of its output channel. The scale is the largest magnitude in
    the channel divided by 127.5, so the error is at most half a scale. It takes a byte a weight and 4 bytes a channel.

    On a CPU PyTorch's kernel (`torch._weight_int8pack_mm`) reads the integers as they are stored, and multiplies them
    with activations in bfloat16: without AVX-512 it is many times slower in other types. It is made for few rows. The
    rows of a long text are multiplied in float32, apart from those that follow them, so that drafts change no result.
    On other devices, and in float64, the integers are first converted to the type of the activations. Then only memory
    is saved. The backends "triton" and "compile" multiply few rows by a kernel, which reads the integers as they are.

    Args:
        layers: the layer, with a weight [out, in] in floating point; or several with the same inputs, as one layer.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight, self.bias = joined_weight(layers), joined_bias(layers)
        self.out_features, self.in_features = weight.shape
        weight = weight.float()
        scales = weight.abs().amax(1) / 127.5
        integers = (weight * (1 / scales.clamp_min(torch.finfo(scales.dtype).tiny))[:, None]).round().clamp(-128, 127)
        self.integers = nn.Parameter(integers.to(torch.int8), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        # The kernel wants scales in bfloat16, which would round them. So the product is scaled behind it.
        self.ones: Tensor
        self.register_buffer("ones", torch.ones_like(scales, dtype=torch.bfloat16), persistent=False)

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        rows = inputs.reshape(-1, self.in_features)
        if rows.device.type != "cpu" or rows.dtype == torch.float64:
            return _finish(self._converted(rows), inputs, self.bias)
        text = rows_of_text(len(rows))
        if text < _LEAST_TEXT:
            return _finish(self._by_kernel(rows), inputs, self.bias)
        products = [self._in_float32(rows[:text].float()), self._by_kernel(rows[text:])]
        return _finish(torch.cat(products), inputs, self.bias)

    def _by_kernel(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows m"]:
        return torch._weight_int8pack_mm(rows.bfloat16(), self.integers, self.ones) * self.scales

    def _in_float32(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows m"]:
        if ONEDNN not in packed_layouts(torch.float32):
            return self._converted(rows)
        # Over many rows oneDNN needs no laid out weight. On some processors it is twice as fast as PyTorch's own.
        weight = self.integers.float()
        return ONEDNN.multiply(rows, weight, weight, None) * self.scales

    def _converted(self, rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows m"]:
        scales: Tensor = self.scales
        if rows.dtype == torch.float16:
            rows, scales = rows / _FLOAT16_FACTOR, scales * _FLOAT16_FACTOR
        return nn.functional.linear(rows, self.integers.to(rows.dtype)) * scales


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, on a CPU.

    The weights from 32 inputs to one output share a grid. A weight is `least + n * step`: n is a whole number from 0 to
    15, `least` the least weight of the group, and `step` a fifteenth of its range. So a weight that lies on such a grid
    keeps its value, as those of GGUF files of the type Q4_1 do, except that the grid itself is rounded to bfloat16. Any
    other weight moves by half a step at most.

    PyTorch's kernel (`torch._weight_int4pack_mm_for_cpu`) multiplies with activations and grids in bfloat16: without
    AVX-512 it is many times slower in other types. float64 is multiplied in float32. A weight takes 4 bits, and a group
    4 bytes: 5 bits a weight.

    Args:
        layers: the layer, with a weight [out, in] on a CPU; or several with the same inputs, as one layer. The number
            of inputs is a multiple of `group`.
        group: inputs that share a grid, a multiple of 32.
    """

    def __init__(self, *layers: nn.Linear, group: int = GROUP) -> None:
        super().__init__()
        weight, self.bias = joined_weight(layers), joined_bias(layers)
        self.out_features, self.in_features = weight.shape
        integers, least, step = on_grid(weight.float(), group)
        least, step = (part.repeat_interleave(group // GROUP, dim=1) for part in (least, step))
        missing = -self.out_features % _OUTPUTS
        integers, least, step = (nn.functional.pad(part, (0, 0, 0, missing)) for part in (integers, least, step))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.contiguous(), 1)
        grids = torch.stack([step, least + _MIDDLE * step], dim=-1).transpose(0, 1).contiguous()  # [in / 32, out, 2]
        self.packed = nn.Parameter(packed, requires_grad=False)
        kind = torch.float32 if weight.dtype == torch.float64 else torch.bfloat16
        self.grids = nn.Parameter(grids.to(kind), requires_grad=False)

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        rows = inputs.reshape(-1, self.in_features).to(self.grids.dtype)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.grids)
        return _finish(product[:, : self.out_features], inputs, self.bias)


def rounding(model: PreTrainedModel) -> torch.dtype:
    """Return the type in which a model's products are rounded: quantised layers on a CPU use bfloat16 at best."""
    quantised = any(isinstance(module, Int8Linear | Int4Linear) for module in model.modules())
    coarse = quantised and model.dtype != torch.float64 and model.device.type == "cpu"
    return torch.bfloat16 if coarse else model.dtype


def on_grid(
    weight: Float[Tensor, "m n"], group: int
) -> tuple[Int[Tensor, "m n"], Float[Tensor, "m groups"], Float[Tensor, "m groups"]]:
    """Round a weight to the grids of its groups.

    Returns:
        The integers from 0 to 15 as int32, and for each output and group the least weight and the step.
    """
    groups = weight.unflatten(1, (-1, group))
    least, most = groups.aminmax(dim=-1)
    step = (most - least) / (_LEVELS - 1)
    # A group of equal weights has no range: all its integers are 0.
    integers = ((groups - least[..., None]) / step.clamp_min(torch.finfo(step.dtype).tiny)[..., None]).round()
    return integers.clamp(0, _LEVELS - 1).flatten(1).int(), least, step


def _finish(product: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return a product [rows, out] in the shape and the type of the inputs, with the bias added."""
    output = product.to(inputs.dtype).view(*inputs.shape[:-1], -1)
    return output if bias is None else output + bias
