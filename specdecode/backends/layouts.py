"""Layouts of the weights of linear layers: ways to store a weight, and to multiply with it.

PyTorch's `F.linear` passes float32 weights to the matrix library as they lie in memory. In every call with more than a
row or two, the library then changes their layout again. So eight rows cost twice as much as one, which cancels the gain
of speculation. Intel's two libraries also multiply with weights that were laid out once: oneMKL (`cblas_sgemm_pack`,
`cblas_sgemm_compute`) and oneDNN. Which of them is faster depends on the processor.

The result of a row may also depend, in its last bits, on the number of rows: a library may sum a lone row, or the last
few of many, in another order. This depends on the processor, too, so `exact_layouts` tries it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Rows for which a library optimises its layout: a draft of medium length. Any number of rows can use it.
_LAYOUT_ROWS = 16
# Numbers of rows over which a row's result must be the same: drafts, trees, and prompts.
_TRIED_ROWS = (*range(2, 18), 24, 31, 32, 33, 48, 64, 72, 100, 300)
# Number of different rows among them. It shares no factor with a library's blocks of rows.
_DIFFERENT_ROWS = 7
# Sizes of blocks of rows. In full blocks no row is summed as a lone row, or as one of the last few.
_BLOCKS = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to store a weight, and to multiply with it.

    Attributes:
        name: its name, in words.
        bytes_per_weight: bytes that a product reads for each weight; None for those of the weight's own type.
        pack: lays out a weight [out, in].
        multiply: multiplies inputs [*rows, in] with a weight that was laid out, and adds a bias [out]. Arguments: the
            inputs, the result of `pack`, an empty tensor of the weight's shape, and the bias or None.
    """

    name: str
    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    bytes_per_weight: int | None = None


def _by_onemkl(inputs: Tensor, packed: Tensor, shape: Tensor, bias: Tensor | None) -> Tensor:
    # The operator reads only the shape of the original weight, if its last argument equals the rows of its input.
    output: Tensor = torch.ops.mkl._mkl_linear(inputs, packed, shape, bias, inputs.numel() // inputs.shape[-1])
    return output


def _by_onednn(inputs: Tensor, packed: Tensor, shape: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return output


def _by_onednn_in_float32(inputs: Tensor, packed: Tensor, shape: Tensor, bias: Tensor | None) -> Tensor:
    return _by_onednn(inputs.float(), packed, shape, None if bias is None else bias.float()).to(inputs.dtype)


def _as_it_is(inputs: Tensor, weight: Tensor, shape: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(inputs, weight, bias)


def _row_by_row(inputs: Tensor, weight: Tensor, shape: Tensor, bias: Tensor | None) -> Tensor:
    rows = inputs.reshape(-1, 1, inputs.shape[-1])
    # Each row gets memory of its own: the order of a library's sum depends on the alignment, too.
    products = torch.cat([nn.functional.linear(row.clone(), weight, bias) for row in rows])
    return products.view(*inputs.shape[:-1], -1)


def _for_onemkl(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), _LAYOUT_ROWS)
    return packed


def _for_onednn(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAYOUT_ROWS)
    return packed


ONEMKL = Layout("oneMKL", _for_onemkl, _by_onemkl)
ONEDNN = Layout("oneDNN", _for_onednn, _by_onednn)
ONEDNN_IN_FLOAT32 = Layout("oneDNN in float32", lambda weight: _for_onednn(weight.float()), _by_onednn_in_float32, 4)
PLAIN = Layout("PyTorch", lambda weight: weight, _as_it_is)
ROW_BY_ROW = Layout("PyTorch, row by row", lambda weight: weight, _row_by_row)


@functools.cache
def in_blocks(layout: Layout, size: int) -> Layout:
    """Return the layout with products over full blocks of rows: rows of zeros fill the last block."""

    def multiply(inputs: Tensor, packed: Tensor, shape: Tensor, bias: Tensor | None) -> Tensor:
        count = inputs.numel() // inputs.shape[-1]
        missing = -count % size
        if not missing:
            return layout.multiply(inputs, packed, shape, bias)
        filled = nn.functional.pad(inputs.reshape(count, -1), (0, 0, 0, missing))
        return layout.multiply(filled, packed, shape, bias)[:count].view(*inputs.shape[:-1], -1)

    return Layout(f"{layout.name} in blocks of {size} rows", layout.pack, multiply, layout.bytes_per_weight)


def _with_blocks(layout: Layout) -> list[Layout]:
    return [layout, *(in_blocks(layout, size) for size in _BLOCKS)]


LAYOUTS = {
    layout.name: layout for one in (ONEMKL, ONEDNN, ONEDNN_IN_FLOAT32, PLAIN) for layout in _with_blocks(one)
} | {ROW_BY_ROW.name: ROW_BY_ROW}
"""All layouts, by name."""


def packed_layouts(dtype: torch.dtype) -> list[Layout]:
    """Return the layouts of a library that multiply weights of this type, in this type, on this processor."""
    onemkl = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
    return [
        *([ONEMKL] if onemkl and dtype == torch.float32 else []),
        *([ONEDNN] if dtype in _onednn_types() else []),
    ]


def exact_layouts(shapes: Collection[tuple[int, int]], dtype: torch.dtype) -> list[Layout]:
    """Return the layouts with which the result of a row does not depend, to the last bit, on the other rows.

    They are tried on this processor. Besides the layouts of a library there are the weights as they are, and 16-bit
    weights laid out in float32, for processors that multiply only these fast. One that does not pass is tried in blocks
    of rows. If none passes, there are products row by row, for which it always holds.

    Args:
        shapes: the shapes [out, in] of the weights.
        dtype: their type.
    """
    own = packed_layouts(dtype)
    wider = dtype.itemsize == 2 and ONEDNN not in own and torch.float32 in _onednn_types()
    candidates = [*own, *([ONEDNN_IN_FLOAT32] if wider else []), PLAIN]
    passed = [
        next((form for form in _with_blocks(layout) if _is_exact(form, shapes, dtype)), None) for layout in candidates
    ]
    return [layout for layout in passed if layout is not None] or [ROW_BY_ROW]


def _onednn_types() -> list[torch.dtype]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return []
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return [torch.float32, *(dtype for dtype, can in supported.items() if can)]


@torch.inference_mode()
def _is_exact(layout: Layout, shapes: Collection[tuple[int, int]], dtype: torch.dtype) -> bool:
    """Return whether rows have the same products alone and beside others, with weights of each shape."""
    return all(_rows_are_apart(layout, *shape, dtype) for shape in shapes)


def _rows_are_apart(layout: Layout, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Return whether some rows have the same products alone and beside others, with one weight.

    The terms of each sum cancel out. Otherwise 16 bits would hide almost every difference: they keep the first digits
    of a sum, and its order changes the last.
    """
    generator = torch.Generator().manual_seed(0)
    half, order = inputs // 2, torch.randperm(inputs // 2, generator=generator)
    few = torch.zeros(_DIFFERENT_ROWS, inputs, dtype=dtype)
    weight = torch.zeros(outputs, inputs, dtype=dtype)
    for terms in (few, weight):
        terms[:, :half].normal_(generator=generator)
        terms[:, half : 2 * half] = terms[:, :half][:, order]
    few[:, half:].neg_()
    packed, shape = layout.pack(weight), weight.new_empty(()).expand(weight.shape)
    alone = torch.cat([layout.multiply(row[None], packed, shape, None) for row in few])
    return all(
        torch.equal(layout.multiply(few[which], packed, shape, None), alone[which])
        for which in (torch.arange(rows) % _DIFFERENT_ROWS for rows in _TRIED_ROWS)
    )
