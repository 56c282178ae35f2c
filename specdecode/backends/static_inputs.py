"""The inputs of a forward over static shapes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from specdecode.core.transfer import moved


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """The inputs that change from one static forward to the next, padded at the end to W rows and S slots.

    Attributes:
        tokens: [W] token ids.
        positions: [W] positions of the tokens.
        start: slot of the first token; the other tokens take the slots after it.
        first: first slot that some row does not attend to; all rows attend to all slots before it.
        visible: [W, S] whether row i attends to slot `first` + j.
        states: [W, F] hidden states that a draft head reads beside the tokens; None for a language model.
        last: the last row that is not padding.
        wanted: [1] the only row whose logits a language model computes; None for all rows.
    """

    tokens: Int[Tensor, " W"]
    positions: Int[Tensor, " W"]
    start: Int[Tensor, ""]
    first: Int[Tensor, ""]
    visible: Bool[Tensor, "W S"]
    states: Float[Tensor, "W F"] | None = None
    last: Int[Tensor, ""] | None = None
    wanted: Int[Tensor, " 1"] | None = None

    def to(self, device: torch.device) -> StaticInputs:
        """Return the inputs on a device."""
        values = (getattr(self, field.name) for field in fields(self))
        there: list[Any] = [None if value is None else moved(value, device) for value in values]
        return StaticInputs(*there)


def inputs_in(
    buffer: UInt8[Tensor, " bytes"], width: int, across: int, states: Float[Tensor, "W F"] | None
) -> StaticInputs:
    """Return the inputs that lie in a buffer, beside the states, which are always on the device."""
    numbers, visible = buffer[: -width * across], buffer[-width * across :]
    tokens, positions, (start, first, last) = numbers.view(torch.long).split((width, width, 3))
    return StaticInputs(tokens, positions, start, first, visible.view(torch.bool).view(width, across), states, last)


def visible_slots(inputs: StaticInputs, span: int) -> Bool[Tensor, "W span"]:
    """Return, for each row, a mask of the first `span` slots that it attends to."""
    recent = torch.arange(span, device=inputs.first.device) - inputs.first
    across = inputs.visible.shape[1]
    within = (recent >= 0) & (recent < across)
    return (recent < 0) | (inputs.visible[:, recent.clamp(0, across - 1)] & within)
