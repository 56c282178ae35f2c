"""Attention masks: the slots that each token attends to, in the form that a model accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdecode.backends.static_inputs import StaticInputs, visible_slots
from specdecode.core.slots import Slots
from specdecode.core.transfer import moved

Mask = Tensor | dict[str, Tensor]
"""The 4-D additive mask of a forward, or one such mask for each type of layers."""


@dataclass(frozen=True, slots=True)
class MaskForm:
    """The form of the masks that a model accepts.

    Attributes:
        window: width of the model's sliding-window attention, in positions; None if no layer has a window.
        by_layer_type: whether the model accepts one mask for each type of layers; otherwise one mask for all layers.
        dtype: type of the masks.
    """

    window: int | None
    by_layer_type: bool
    dtype: torch.dtype

    def masks(self, sequences: Sequence[Slots], visible: Sequence[Bool[Tensor, "_ _"]], size: int) -> Mask:
        """Return the mask of a forward over several sequences, as wide as the slots of the longest one.

        Args:
            sequences: slots of each sequence, with the slots for the new tokens already reserved.
            visible: [n, s] for each sequence: row i marks the slots that its token i attends to, among its last s
                slots. It also attends to all slots before these. The n tokens are the last of the `size` tokens, behind
                the padding.
            size: number of tokens of each sequence, padding included.
        """
        device = sequences[0].device
        length = max(slots.length for slots in sequences)
        allowed = torch.zeros(len(sequences), size, length, dtype=torch.bool, device=device)
        for row, slots, recent in zip(allowed, sequences, visible, strict=True):
            count, width = recent.shape
            row[size - count :, : slots.length] = True
            row[size - count :, slots.length - width : slots.length] = moved(recent, device)
        if self.window is None:
            return self._as_taken(allowed, allowed)
        near = allowed.clone()
        for row, slots, recent in zip(near, sequences, visible, strict=True):
            positions, count = slots.positions[: slots.length], len(recent)
            row[size - count :, : slots.length] &= positions[-count:, None] - positions[None, :] < self.window
        return self._as_taken(allowed, near)

    def static_masks(self, inputs: StaticInputs, positions: Int[Tensor, " span"]) -> Mask:
        """Return the mask of a forward over static shapes, computed on the device.

        Args:
            inputs: inputs of the forward.
            positions: positions in the slots that the forward attends to.
        """
        allowed = visible_slots(inputs, len(positions))
        near = allowed
        if self.window is not None:
            near = allowed & (inputs.positions[:, None] - positions[None, :] < self.window)
        return self._as_taken(allowed[None], near[None])

    def _as_taken(self, allowed: Bool[Tensor, "rows n length"], near: Bool[Tensor, "rows n length"]) -> Mask:
        """Return the masks in the form that the model accepts.

        Args:
            allowed: mask of all visible slots.
            near: mask of the visible slots within the window.
        """
        if self.by_layer_type:
            return {"full_attention": self._additive(allowed), "sliding_attention": self._additive(near)}
        return self._additive(near)

    def _additive(self, allowed: Bool[Tensor, "rows n length"]) -> Float[Tensor, "rows 1 n length"]:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)[:, None]
