"""Attention whose result for a row does not depend, to the last bit, on the other rows of a forward.

Each row attends by itself to the keys that it sees, in their order. The context is cut into parts of a fixed size,
which are combined one after the other. So neither the number of rows nor the slots of a tree change the order of a sum.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from specdecode.backends.grouped_attention import attend
from specdecode.backends.kernels.attention import WIDEST_KEY, takes
from specdecode.core.errors import UnsupportedModelError

# Keys of a part, and of a block of a part. Both order the sums, so they are the same for every forward.
_PART, _BLOCK = 256, 32
# Query heads of a program: as many rows as one matrix instruction of a GPU takes at least.
_HEADS = 16
# Most bytes of the parts' sums at a time.
_MOST_BYTES = 2**26

# A model gives all layers of a type the same mask.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


# Numbers that change from one shape to the next need no code of their own, which might sum in another order.
@triton.jit(do_not_specialize=["groups", "shared", "tokens", "length", "first_row", "rows"])
@no_type_check  # Triton compiles the source, so that checks of types cannot wrap it
def _attend_to_part(
    query,
    key,
    value,
    order,
    counts,
    sums,
    totals,
    greatest,
    scale,
    groups,
    shared,
    tokens,
    length,
    first_row,
    rows,
    dim,
    sequence_stride,
    head_stride,
    slot_stride,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
):
    """Attend to one part of the keys that one row sees, with some of the query heads that share a key head. Write the
    weighted sum of values, the sum of weights, and the greatest score."""
    head_blocks = tl.cdiv(groups, HEADS)
    program = tl.program_id(0)
    head = (program // head_blocks) % shared
    row = program // head_blocks // shared
    part = tl.program_id(1)
    members = (program % head_blocks) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, DIM)
    in_group = members < groups
    in_dims = dims < dim
    count = tl.load(counts + first_row + row)
    if part * PART < count:
        heads = groups * shared
        in_block = in_group[:, None] & in_dims[None, :]
        places = row * heads + head * groups + members
        queries = tl.load(
            query + (first_row * heads + places)[:, None].to(tl.int64) * dim + dims[None, :], mask=in_block, other=0.0
        )
        base = ((first_row + row) // tokens).to(tl.int64) * sequence_stride + head.to(tl.int64) * head_stride
        best = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        summed = tl.zeros([HEADS, DIM], tl.float32)
        end = tl.minimum((part + 1) * PART, count)
        for begin in range(part * PART, end, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            inside = at < end
            slots = tl.load(order + (first_row + row).to(tl.int64) * length + at, mask=inside, other=0).to(tl.int64)
            keys = tl.load(
                key + base + slots[None, :] * slot_stride + dims[:, None],
                mask=inside[None, :] & in_dims[:, None],
                other=0.0,
            )
            scores = tl.dot(queries, keys, input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            greater = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp(scores - greater[:, None])
            shrunk = tl.exp(best - greater)
            values = tl.load(
                value + base + slots[:, None] * slot_stride + dims[None, :],
                mask=inside[:, None] & in_dims[None, :],
                other=0.0,
            )
            total = total * shrunk + tl.sum(weights, 1)
            summed = summed * shrunk[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            best = greater
        places += part * rows * heads
        tl.store(sums + places[:, None].to(tl.int64) * dim + dims[None, :], summed, mask=in_block)
        tl.store(totals + places, total, mask=in_group)
        tl.store(greatest + places, best, mask=in_group)


@triton.jit(do_not_specialize=["heads", "first_row", "rows"])
@no_type_check
def _combine_in_order(
    sums, totals, greatest, counts, output, heads, first_row, rows, dim, PART: tl.constexpr, DIM: tl.constexpr
):
    """Combine the parts of one row and head, one after the other."""
    place = tl.program_id(0)
    dims = tl.arange(0, DIM)
    in_dims = dims < dim
    count = tl.load(counts + first_row + place // heads)
    best = float("-inf")
    total = 0.0
    summed = tl.zeros([DIM], tl.float32)
    for part in range(0, tl.cdiv(count, PART)):
        at = part * rows * heads + place
        found = tl.load(greatest + at)
        greater = tl.maximum(best, found)
        kept = tl.exp(best - greater)
        share = tl.exp(found - greater)
        total = total * kept + tl.load(totals + at) * share
        summed = summed * kept + tl.load(sums + at.to(tl.int64) * dim + dims, mask=in_dims, other=0.0) * share
        best = greater
    result = summed / tl.where(total == 0.0, 1.0, total)
    place_of_row = (first_row * heads + place).to(tl.int64)
    tl.store(output + place_of_row * dim + dims, result.to(output.dtype.element_ty), mask=in_dims)


def attend_row_by_row(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length dim"],
    mask: Float[Tensor, "batch 1 n length"],
    scale: float,
) -> Float[Tensor, "batch n heads dim"]:
    """Attend to the slots whose mask is 0, each row by itself.

    Args:
        query: the rows of some sequences, on the device of all tensors and in one of `kernels.TYPES`.
        key: the keys of their slots. The components of a key are neighbours in memory.
        value: the values of the slots.
        mask: 0 where a row attends to a slot. The slots that a row attends to are in the order of their positions.
        scale: factor of the scores.

    Returns:
        The attended values; 0 for a row that attends to no slot.
    """
    batch, heads, tokens, dim = query.shape
    shared, length = key.shape[1:3]
    order, counts = _seen_slots(mask)
    if value.stride() != key.stride():
        key, value = key.contiguous(), value.contiguous()
    groups, parts, padded = heads // shared, triton.cdiv(length, _PART), max(triton.next_power_of_2(dim), 16)
    queries = query.transpose(1, 2).contiguous()
    output = torch.empty_like(queries)
    at_once = max(_MOST_BYTES // (4 * parts * heads * dim), 1)
    for first_row in range(0, batch * tokens, at_once):
        rows = min(at_once, batch * tokens - first_row)
        sums = query.new_empty(parts, rows * heads, dim, dtype=torch.float32)
        totals, greatest = (query.new_empty(parts, rows * heads, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(query):
            _attend_to_part[(rows * shared * triton.cdiv(groups, _HEADS), parts)](
                queries,
                key,
                value,
                order,
                counts,
                sums,
                totals,
                greatest,
                scale,
                groups,
                shared,
                tokens,
                length,
                first_row,
                rows,
                dim,
                key.stride(0),
                key.stride(1),
                key.stride(2),
                HEADS=_HEADS,
                PART=_PART,
                BLOCK=_BLOCK,
                DIM=padded,
            )
            _combine_in_order[(rows * heads,)](
                sums, totals, greatest, counts, output, heads, first_row, rows, dim, PART=_PART, DIM=padded
            )
    return output


def _seen_slots(mask: Float[Tensor, "batch 1 n length"]) -> tuple[Int[Tensor, "rows length"], Int[Tensor, " rows"]]:
    """Return the slots that each row attends to, in ascending order and with padding at the end; and their number."""
    if mask not in _seen:
        visible = (mask == 0).flatten(0, 2)
        rows, length = visible.shape
        slots = torch.arange(length, dtype=torch.int32, device=mask.device).expand(rows, length)
        # The slots that a row does not see are all written behind the last column.
        places = (visible.cumsum(1) - 1).where(visible, length)
        order = torch.zeros(rows, length + 1, dtype=torch.int32, device=mask.device).scatter_(1, places, slots)
        _seen[mask] = order[:, :length].contiguous(), visible.sum(1, dtype=torch.int32)
    seen: tuple[Tensor, Tensor] = _seen[mask]
    return seen


def attend_each_row(
    module: Any,
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length width"],
    attention_mask: Shaped[Tensor, "batch _ n length"] | None,
    **others: Any,
) -> tuple[Float[Tensor, "batch n heads width"], None]:
    """Attend by the kernel in forwards over slots, whose mask is a sum, and like `grouped_attention.attend` elsewhere.

    Returns:
        The attended values, and None in place of attention weights.

    Raises:
        UnsupportedModelError: the kernel does not compute the model's attention.
    """
    if attention_mask is None or not attention_mask.is_floating_point():
        return attend(module, query, key, value, attention_mask, **others)
    if not takes(query, key, value, attention_mask, others):
        raise UnsupportedModelError(
            f"no kernel attends like its {type(module).__name__}: the keys are wider than {WIDEST_KEY} bytes or than"
            " the values, or the scores are no plain products"
        )
    return attend_row_by_row(query, key, value, attention_mask, others.get("scaling") or query.shape[3] ** -0.5), None
