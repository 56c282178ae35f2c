"""Attention of a few rows over the slots of a sequence. The context is split among programs, and then combined.

The number of slots to read comes from a tensor. So a captured graph reads the filled slots only, and not all of the
rounded span that it was captured for (Flash-Decoding: Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from specdecode.backends.grouped_attention import attend
from specdecode.backends.kernels import TYPES, KernelModule
from specdecode.backends.static import WIDTHS, StaticForward
from specdecode.backends.static_inputs import StaticInputs

WIDEST_KEY = 512
"""Most bytes of a key of a head: blocks of wider ones exceed the shared memory of smaller GPUs."""

# Most rows of a program: more of them exceed its registers.
_MOST_ROWS = 32
# Programs that keep a large GPU busy: about two for each of its processors.
_PROGRAMS = 256
# Most parts of a context, as one program combines all of a row. And least slots of a part.
_MOST_SPLITS, _LEAST_SLOTS = 32, 128

_places: ContextVar[tuple[Tensor, Tensor | None] | None] = ContextVar("_places", default=None)
"""In a forward over static shapes, `start` and `first` of `attend_to_slots`."""


# Numbers that change from one shape to the next need no code of their own.
@triton.jit(do_not_specialize=["rows_of_head", "width", "span"])
@no_type_check  # Triton compiles the source, so that checks of types cannot wrap it
def _attend_to_part(
    query,
    key,
    value,
    mask,
    start,
    first,
    sums,
    totals,
    greatest,
    scale,
    rows_of_head,
    width,
    span,
    dim,
    head_stride,
    slot_stride,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Attend to one part of the context. Write the weighted sum of values, the sum of weights, and the greatest score
    of each row."""
    row_blocks = tl.cdiv(rows_of_head, ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    rows = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    in_rows = rows < rows_of_head
    in_dims = dims < dim
    length = tl.minimum(tl.load(start).to(tl.int32) + width, span)
    size = tl.cdiv(tl.cdiv(length, splits), SLOTS) * SLOTS
    begin = split * size
    end = tl.minimum(begin + size, length)
    shared = 0
    if first is not None:
        shared = tl.load(first).to(tl.int32)
    row_places = head * rows_of_head + rows
    in_block = in_rows[:, None] & in_dims[None, :]
    queries = tl.load(query + row_places[:, None] * dim + dims[None, :], mask=in_block, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, DIM], tl.float32)
    for block in range(begin, end, SLOTS):
        slots = block + tl.arange(0, SLOTS)
        in_slots = slots < end
        keys = tl.load(
            key + head * head_stride + slots[None, :] * slot_stride + dims[:, None],
            mask=in_slots[None, :] & in_dims[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        inside = in_rows[:, None] & in_slots[None, :]
        masked = inside & (slots >= shared)[None, :]
        hidden = tl.load(mask + (rows % width)[:, None] * span + slots[None, :], mask=masked, other=0.0)
        visible = inside & (hidden == 0)
        scores = tl.where(visible, scores, float("-inf"))
        greater = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen no slot yet has no score: minus infinity less itself would be NaN.
        base = tl.where(greater == float("-inf"), 0.0, greater)
        weights = tl.exp(scores - base[:, None])
        shrunk = tl.exp(best - base)
        # Slots that no row sees may hold NaN, and 0 times NaN is NaN: so their values are not read.
        seen = tl.max(visible.to(tl.int32), 0) > 0
        values = tl.load(
            value + head * head_stride + slots[:, None] * slot_stride + dims[None, :],
            mask=seen[:, None] & in_dims[None, :],
            other=0.0,
        )
        total = total * shrunk + tl.sum(weights, 1)
        summed = summed * shrunk[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        best = greater
    heads = tl.num_programs(0) // row_blocks
    places = split * heads * rows_of_head + row_places
    tl.store(sums + places[:, None] * dim + dims[None, :], summed, mask=in_block)
    tl.store(totals + places, total, mask=in_rows)
    tl.store(greatest + places, best, mask=in_rows)


@triton.jit(do_not_specialize=["rows", "width", "splits"])
@no_type_check
def _combine_parts(sums, totals, greatest, output, rows, width, dim, splits, SPLITS: tl.constexpr, DIM: tl.constexpr):
    """Combine the parts of one row of one head. Write its values behind those of the row's earlier heads."""
    row = tl.program_id(0)
    parts = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    in_parts = parts < splits
    in_dims = dims < dim
    places = parts * rows + row
    best = tl.load(greatest + places, mask=in_parts, other=float("-inf"))
    total = tl.load(totals + places, mask=in_parts, other=0.0)
    summed = tl.load(sums + places[:, None] * dim + dims[None, :], mask=in_parts[:, None] & in_dims[None, :], other=0.0)
    greater = tl.max(best, 0)
    weights = tl.exp(best - tl.where(greater == float("-inf"), 0.0, greater))
    whole = tl.sum(weights * total, 0)
    result = tl.sum(weights[:, None] * summed, 0) / tl.where(whole == 0.0, 1.0, whole)
    place = (row % width) * (rows // width) + row // width
    tl.store(output + place * dim + dims, result.to(output.dtype.element_ty), mask=in_dims)


def attend_to_slots(
    query: Float[Tensor, "1 heads W dim"],
    key: Float[Tensor, "1 shared span dim"],
    value: Float[Tensor, "1 shared span dim"],
    mask: Float[Tensor, "1 1 W span"],
    start: Int[Tensor, ""],
    first: Int[Tensor, ""] | None,
    scale: float,
) -> Float[Tensor, "1 W heads dim"]:
    """Attend to the slots whose mask is 0, among the first `start` + W.

    Args:
        query: the rows of a sequence, on the device of all tensors and in one of `kernels.TYPES`.
        key: the keys of the slots. The components of a key are neighbours in memory.
        value: the values of the slots, with the strides of the keys.
        mask: 0 where a row attends to a slot.
        start: slot of the first row.
        first: all rows attend to all slots before this one, whose mask is not read. None reads the whole mask.
        scale: factor of the scores.

    Returns:
        The attended values; 0 for a row that attends to no slot.
    """
    _, heads, width, dim = query.shape
    shared, span = key.shape[1:3]
    rows_of_head = heads // shared * width
    padded = max(triton.next_power_of_2(dim), 16)
    rows = min(max(triton.next_power_of_2(rows_of_head), 16), _MOST_ROWS)
    row_blocks = triton.cdiv(rows_of_head, rows)
    wanted = triton.cdiv(_PROGRAMS, shared * row_blocks)
    splits = max(min(wanted, triton.cdiv(span, _LEAST_SLOTS), _MOST_SPLITS), 1)
    sums = query.new_empty(splits, heads * width, dim, dtype=torch.float32)
    totals, greatest = (query.new_empty(splits, heads * width, dtype=torch.float32) for _ in range(2))
    output = query.new_empty(1, width, heads, dim)
    with torch.cuda.device_of(query):
        _attend_to_part[(shared * row_blocks, splits)](
            query.contiguous(),
            key,
            value,
            mask.contiguous(),
            start,
            first,
            sums,
            totals,
            greatest,
            scale,
            rows_of_head,
            width,
            span,
            dim,
            key.stride(1),
            key.stride(2),
            ROWS=rows,
            SLOTS=32 if padded * query.itemsize > WIDEST_KEY // 2 else 64,
            DIM=padded,
            num_stages=2,
        )
        _combine_parts[(heads * width,)](
            sums,
            totals,
            greatest,
            output,
            heads * width,
            width,
            dim,
            splits,
            SPLITS=triton.next_power_of_2(splits),
            DIM=padded,
        )
    return output


def attend_to_slots_reference(
    query: Float[Tensor, "1 heads W dim"],
    key: Float[Tensor, "1 shared span dim"],
    value: Float[Tensor, "1 shared span dim"],
    mask: Float[Tensor, "1 1 W span"],
    start: Int[Tensor, ""],
    first: Int[Tensor, ""] | None,
    scale: float,
) -> Float[Tensor, "1 W heads dim"]:
    """Attend as `attend_to_slots` does, in PyTorch and in float32."""
    groups = query.shape[1] // key.shape[1]
    slots = torch.arange(key.shape[2], device=key.device)
    visible = (mask == 0) & (slots < start + query.shape[2])
    if first is not None:
        visible |= slots < first
    key, value = (tensor.float().repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query.float() @ key.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    value = value.masked_fill(~visible.any(2)[:, :, :, None], 0.0)
    return (weights @ value).transpose(1, 2).to(query.dtype).contiguous()


def over_slots(forward: StaticForward, whole_mask: bool) -> StaticForward:
    """Return a forward whose attention takes the number of slots to read from its inputs.

    Args:
        forward: the forward. Its model attends by `attend_over_slots`.
        whole_mask: whether a row may not attend to a slot before `StaticInputs.first`, as in a sliding window.
    """

    def run(
        inputs: StaticInputs, positions: Int[Tensor, " span"], keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
    ) -> tuple[Tensor, ...]:
        token = _places.set((inputs.start, None if whole_mask else inputs.first))
        try:
            return forward(inputs, positions, keys, values)
        finally:
            _places.reset(token)

    return run


def attend_over_slots(
    module: Any,
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length width"],
    attention_mask: Shaped[Tensor, "batch _ n length"] | None,
    **others: Any,
) -> tuple[Float[Tensor, "batch n heads width"], None]:
    """Attend by the kernel in forwards over static shapes, and like `grouped_attention.attend` elsewhere.

    Returns:
        The attended values, and None in place of attention weights.
    """
    places = _places.get()
    if places is None or attention_mask is None or not _takes_one(query, key, value, attention_mask, others):
        return attend(module, query, key, value, attention_mask, **others)
    scale = others.get("scaling") or query.shape[3] ** -0.5
    return attend_to_slots(query, key, value, attention_mask, *places, scale), None


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, others: Mapping[str, Any]) -> bool:
    """Return whether the kernels compute this attention of one or several sequences."""
    extras = ("position_bias", "softcap", "s_aux")  # other scores than products
    return (
        query.dtype in TYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[3] * query.itemsize <= WIDEST_KEY
        and value.shape == key.shape
        and mask.is_floating_point()
        and mask.shape == (len(query), 1, query.shape[2], key.shape[2])
        and query.shape[1] % key.shape[1] == 0
        and key.stride(3) == value.stride(3) == 1
        and not others.get("dropout")
        and all(others.get(name) is None for name in extras)
    )


def _takes_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, others: Mapping[str, Any]) -> bool:
    """Return whether `attend_to_slots` computes this attention: that of one sequence, for few rows."""
    one = len(query) == 1 and query.shape[2] <= WIDTHS[-1] and value.stride() == key.stride()
    return one and takes(query, key, value, mask, others)


class KernelAttention(KernelModule):
    """The attention of a draft head by the kernel, in forwards over static shapes. Elsewhere the module itself runs."""

    def forward(
        self,
        query: Float[Tensor, "batch heads n dim"],
        key: Float[Tensor, "batch shared length dim"],
        value: Float[Tensor, "batch shared length dim"],
        visible: Bool[Tensor, "n length"],
    ) -> Float[Tensor, "batch n heads dim"]:
        """Return the attended values; see `GroupedAttention`."""
        places = _places.get()
        if places is not None:
            mask = (~visible).to(query.dtype)[None, None]
            if _takes_one(query, key, value, mask, {}):
                return attend_to_slots(query, key, value, mask, *places, query.shape[3] ** -0.5)
        attended: Tensor = self.layer(query, key, value, visible)
        return attended
