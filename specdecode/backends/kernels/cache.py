"""Keys and values of a layer written by one kernel. Its reference, `cache_views.write_to_slots`, launches two."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Shaped
from torch import Tensor


@triton.jit
@no_type_check  # Triton compiles the source, so that checks of types cannot wrap it
def _copy(source, stride, target, width, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    inside = at < width
    tl.store(target + at, tl.load(source + at * stride, mask=inside), mask=inside)


@triton.jit
@no_type_check
def _write(
    keys,
    values,
    layer_keys,
    layer_values,
    places,
    heads,
    key_width,
    value_width,
    key_head_stride,
    key_row_stride,
    key_stride,
    value_head_stride,
    value_row_stride,
    value_stride,
    layer_key_head_stride,
    layer_key_slot_stride,
    layer_value_head_stride,
    layer_value_slot_stride,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Write a token's key of one head or, in the programs behind those of the keys, its value."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(places + row).to(tl.int64)
    if head < heads:
        _copy(
            keys + head * key_head_stride + row * key_row_stride,
            key_stride,
            layer_keys + head * layer_key_head_stride + slot * layer_key_slot_stride,
            key_width,
            KEY,
        )
    else:
        _copy(
            values + (head - heads) * value_head_stride + row * value_row_stride,
            value_stride,
            layer_values + (head - heads) * layer_value_head_stride + slot * layer_value_slot_stride,
            value_width,
            VALUE,
        )


def write_to_slots(
    keys: Shaped[Tensor, "1 heads n dim"],
    values: Shaped[Tensor, "1 shared n width"],
    layer_keys: Shaped[Tensor, "1 heads capacity dim"],
    layer_values: Shaped[Tensor, "1 shared capacity width"],
    places: Int[Tensor, " n"],
) -> None:
    """Write keys and values of n tokens into slots of a layer, as `cache_views.write_to_slots` does.

    Args:
        keys: the keys of the tokens, in any type and with any strides.
        values: the values of the tokens.
        layer_keys: the keys of all slots, of the same type and on the same device. The components of a key are
            neighbours in memory.
        layer_values: the values of all slots, likewise.
        places: the slots to write, each below the capacity and at most once. They are neighbours in memory.
    """
    _, heads, rows, key_width = keys.shape
    _, value_heads, _, value_width = values.shape
    with torch.cuda.device_of(keys):
        _write[(heads + value_heads, rows)](
            keys,
            values,
            layer_keys,
            layer_values,
            places,
            heads,
            key_width,
            value_width,
            *keys.stride()[1:],
            *values.stride()[1:],
            *layer_keys.stride()[1:3],
            *layer_values.stride()[1:3],
            KEY=triton.next_power_of_2(key_width),
            VALUE=triton.next_power_of_2(value_width),
        )
