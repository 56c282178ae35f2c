"""Attention whose result for a row does not depend, to the last bit, on the other rows of a forward.

A kernel for several rows rounds differently from the kernel for one row. In float32 that is harmless. But layers that
round their inputs coarsely, as quantised ones do, turn a difference in the last bit into one of a thousandth. Then the
tokens of speculation would leave those of plain decoding at many near-ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdecode.backends.grouped_attention import (
    attend,
    attend_in_groups,
    attend_to_text,
    attends_to_text,
    switch_attention,
)
from specdecode.backends.row_activations import separate_activations

BY_ROWS = "sdpa_by_rows"
"""The name under which transformers knows `attend_by_rows` as an attention function."""


@dataclass(slots=True)
class _Rows:
    """The rows of a forward.

    Attributes:
        counts: the number of rows of each sequence, without padding.
        separate: for each sequence, the number of rows at its end that attend one by one: the root and its tree.
        slots: for each mask and each sequence, the slots that each row attends to; None for padding. As keys, tensors
            are equal if they are the same object. A key keeps its mask alive, so no later mask is taken for it.
    """

    counts: Sequence[int]
    separate: Sequence[int]
    slots: dict[Tensor, list[list[slice | Tensor | None]]] = field(default_factory=dict)


_rows: ContextVar[_Rows | None] = ContextVar("_rows", default=None)


@contextmanager
def separate_rows(counts: Sequence[int], separate: Sequence[int]) -> Iterator[None]:
    """Within this context, let rows attend one by one.

    Args:
        counts: the number of rows of each sequence of a forward.
        separate: for each sequence, the number of rows at its end that attend one by one. The rows before these are
            text that plain decoding reads in one forward, too.
    """
    token = _rows.set(_Rows(counts, separate))
    try:
        yield
    finally:
        _rows.reset(token)


def rows_of_text(rows: int) -> int:
    """Return how many of the first rows of a forward are text that plain decoding reads in one forward, too; 0 if the
    forward has several sequences, or another number of rows."""
    if torch.compiler.is_compiling():  # compiled code reads with masks
        return 0
    forward = _rows.get()
    return rows - forward.separate[0] if forward is not None and list(forward.counts) == [rows] else 0


def by_rows(model: PreTrainedModel) -> None:
    """Let no row of a model's forward change another: switch PyTorch's attention to `attend_by_rows`, and separate the
    activations."""
    switch_attention(model, BY_ROWS, attend_by_rows)
    separate_activations(model)


def attend_by_rows(
    module: Any,
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length width"],
    attention_mask: Shaped[Tensor, "batch _ n length"] | None,
    **others: Any,
) -> tuple[Float[Tensor, "batch n heads width"], None]:
    """Attend like transformers' SDPA. Each of the last rows attends by itself to the slots that it sees, as it does in
    plain decoding; the rows before these attend together.

    Returns:
        The attended values, and None in place of attention weights.
    """
    if torch.compiler.is_compiling():  # over static shapes, which have no slots of single rows
        return attend(module, query, key, value, attention_mask, **others)
    rows = _rows.get()
    if rows is None or attention_mask is None or attention_mask.shape[1] > 1 or len(query) != len(rows.separate):
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return attended
    if attention_mask not in rows.slots:
        rows.slots[attention_mask] = [[_seen(row) for row in visible] for visible in attention_mask[:, 0] == 0]
    output = query.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3])
    for sequence, (separate, slots) in enumerate(zip(rows.separate, rows.slots[attention_mask], strict=True)):
        one = slice(sequence, sequence + 1)
        text = len(slots) - separate
        # Padding comes first, and sees nothing.
        first = next((row for row, seen in enumerate(slots) if seen is not None), len(slots))
        if first < text <= attends_to_text(query, key):
            output[one, :text] = attend_to_text(module, query, key, value, text, **others)
        elif first < text:
            # Cut off the slots behind the text: a kernel's rounding depends on the number of keys, too.
            last = slots[text - 1]
            length = int(last.stop) if isinstance(last, slice) else int(last[-1]) + 1  # type: ignore[index]
            mask = attention_mask[one, :, first:text, :length]
            parts = (query[one, :, first:text], key[one, :, :length], value[one, :, :length])
            output[one, first:text] = attend(module, *parts, mask, **others)[0]
        for row in range(max(text, first), len(slots)):
            seen = slots[row]
            assert seen is not None
            parts = (query[one, :, row : row + 1], key[one, :, seen], value[one, :, seen])
            output[one, row] = attend_in_groups(*parts, None, **others)[:, 0]
    return output, None


def _seen(visible: Bool[Tensor, " length"]) -> slice | Tensor | None:
    """Return the slots that a row attends to: a slice if they are neighbours, or else ascending indices; None if there
    are none."""
    slots = visible.nonzero()[:, 0]
    if not len(slots):
        return None
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if last - first + 1 == len(slots) else slots
