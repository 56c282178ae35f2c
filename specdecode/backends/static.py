"""Forwards over a few fixed shapes, so that each need be captured or compiled only once.

What grows in decoding are the rows of a forward and the slots that it looks at. Here both are rounded up to one of a
few sizes; what decides where keys are written and which slots a row attends to travels in tensors. The shapes of a
step are then the same again and again, and so are the addresses that it reads, as long as the slots keep theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from specdecode.core.slots import Slots, Storage

# Rows of a forward: a token, drafts of usual lengths, and the largest tree with its root and what an accepted chain
# leaves to read. Wider forwards, which read prompts, are no static ones.
WIDTHS = (1, 2, 4, 8, 16, 32, 48, 72)
# Slots that a forward looks at are rounded up to a multiple of this, and by a quarter at most.
_SPAN = 256
# Storages without slots that are kept for the next ones.
_IDLE = 4
# Captures that are kept for one storage: what each of them holds adds up.
_MOST = 64


class Held:
    """What a static forward sees of slots: as much of a cache as a transformers model asks for.

    Args:
        keys: of each layer, all its slots.
        values: likewise.
        places: the slots to write.
        span: the slots to attend to, from the first on.
    """

    is_initialized = True

    def __init__(
        self,
        keys: Mapping[int, Float[Tensor, "1 heads capacity dim"]],
        values: Mapping[int, Float[Tensor, "1 heads capacity width"]],
        places: Int[Tensor, " n"],
        span: int,
    ) -> None:
        self._keys, self._values = keys, values
        self._places, self._span = places, span

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        held_keys, held_values = self._keys[layer], self._values[layer]
        held_keys.index_copy_(2, self._places, keys)
        held_values.index_copy_(2, self._places, values)
        return held_keys[:, :, : self._span], held_values[:, :, : self._span]

    def get_seq_length(self, layer: int = 0) -> int:
        """Not known: a number would hold for one step alone. Models that need it fail the probe."""
        return 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that changes from one static forward to the next, padded at the end.

    Attributes:
        tokens: [W].
        positions: [W] of the tokens.
        start: the slot of the first token; the others follow.
        first: the first slot that some row does not see; all rows see those before.
        visible: [W, S] which of the slots from `first` on each row sees.
    """

    tokens: Int[Tensor, " W"]
    positions: Int[Tensor, " W"]
    start: Int[Tensor, ""]
    first: Int[Tensor, ""]
    visible: Bool[Tensor, "W S"]


Step = Callable[[Inputs, Int[Tensor, " span"], Mapping[int, Tensor], Mapping[int, Tensor]], tuple[Tensor, ...]]
"""The logits [W, V] of a static forward, and what else it is to tell of its W rows, from its inputs, the positions of
the slots that it looks at, and the keys and values of each layer, which it writes."""

Replay = Callable[[Callable[[], tuple[Tensor, ...]]], Callable[[], tuple[Tensor, ...]]]
"""Makes of an action another that does the same on the same tensors, with what they hold by then. The action may be
done on the way, if its tensors hold something; the results hold until the next time."""


class Static:
    """Runs the forwards of one model over static shapes.

    Args:
        step: a forward.
        replay: captures each shape once, with buffers of its own for what changes. None runs every forward anew, over
            shapes that are not rounded.
    """

    def __init__(self, step: Step, replay: Replay | None = None) -> None:
        self._step = step
        self._replay = replay
        self._idle: list[Storage] = []
        self._captured: weakref.WeakKeyDictionary[Storage, dict[tuple[int, ...], _Captured]] = (
            weakref.WeakKeyDictionary()
        )

    def new_slots(self, capacity: int, device: torch.device) -> Slots:
        """Slots of at least this capacity, with the storage of earlier ones if there is any: what was captured for it
        serves again."""
        fitting = [storage for storage in self._idle if len(storage.positions) >= capacity]
        storage = min(fitting, key=lambda storage: len(storage.positions), default=None)
        if storage is None:
            storage = Storage.empty(_span(capacity + WIDTHS[-1]), device)
        else:
            self._idle.remove(storage)
        slots = Slots(capacity, device, storage)
        weakref.finalize(slots, self._put_back, storage)
        return slots

    def _put_back(self, storage: Storage) -> None:
        if not storage.moves:
            self._idle = [*self._idle, storage][-_IDLE:]

    def span(self, slots: Slots) -> int:
        """Of these slots, those that a forward looks at."""
        return slots.length if self._replay is None else min(_span(slots.length), slots.capacity)

    def takes(self, slots: Slots, rows: int) -> bool:
        """Whether a forward of the last `rows` slots, already taken, can be a static one."""
        start = slots.length - rows
        return rows <= WIDTHS[-1] and bool(slots.storage.keys) and start + self._width(rows) <= slots.capacity

    def run(
        self,
        slots: Slots,
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        visible: Bool[Tensor, "n s"],
    ) -> tuple[Shaped[Tensor, "n _"], ...]:
        """What the step tells of the tokens that take the last n slots, their logits [n, V] first; row i sees all slots
        but those of the last s that `visible` hides from it."""
        count, recent = visible.shape
        start, first = slots.length - count, slots.length - recent
        if self._replay is None:
            now = Inputs(tokens, positions, torch.tensor(start), torch.tensor(first), visible)
            held = slots.storage
            return self._step(_on(now, slots.device), slots.positions[: slots.length], held.keys, held.values)
        width, across = self._width(count), max(self._width(recent), recent)
        captured = self._capture(slots, width, across, self._step, self._replay)
        captured.inputs.tokens[:count].copy_(tokens, non_blocking=True)
        captured.inputs.positions[:count].copy_(positions, non_blocking=True)
        captured.inputs.start.fill_(start)
        captured.inputs.first.fill_(first)
        captured.inputs.visible.zero_()
        captured.inputs.visible[:count, :recent].copy_(visible, non_blocking=True)
        # Padding must see something, within every window: attention to nothing is no number, nor is what a layer then
        # writes.
        captured.inputs.visible[count:, 0] = True
        captured.inputs.positions[count:] = 0
        return tuple(told[:count].clone() for told in captured.run())

    def takes_chain(self, slots: Slots, count: int) -> bool:
        """Whether so many forwards, each over the choice of the one before it, can be captured as one."""
        return self._replay is not None and bool(slots.storage.keys) and slots.length + count <= slots.capacity

    def chain(self, slots: Slots, token: Int[Tensor, " 1"], count: int, vocab_size: int) -> Int[Tensor, " count"]:
        """Read a token and then the model's own choices below `vocab_size`; the last of them is not read."""
        assert self._replay is not None
        start = slots.length
        slots.append(torch.arange(start, start + count, device=slots.device))

        def forwards(
            inputs: Inputs, positions: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
        ) -> tuple[Tensor]:
            token, chosen = inputs.tokens, []
            for ahead in range(count):
                place = inputs.start + ahead
                now = Inputs(token, place[None], place, place, inputs.visible)
                token = self._step(now, positions, keys, values)[0][:, :vocab_size].argmax(-1)
                chosen.append(token)
            return (torch.cat(chosen),)

        captured = self._capture(slots, 1, 1, forwards, self._replay, count, vocab_size)
        captured.inputs.tokens.copy_(token, non_blocking=True)
        captured.inputs.start.fill_(start)
        captured.inputs.visible.fill_(True)
        return captured.run()[0].clone()

    def _capture(
        self,
        slots: Slots,
        width: int,
        across: int,
        action: Step,
        replay: Replay,
        *kind: int,
    ) -> _Captured:
        """What was captured of an action for shapes like these, and slots in the same place; or will be, when it is
        first run."""
        storage = slots.storage
        span = self.span(slots)
        known = self._captured.setdefault(storage, {})
        key = (width, across, span, storage.moves, *kind)
        if key not in known:
            if len(known) >= _MOST:
                known.pop(next(iter(known)))
            inputs = _empty(width, across, slots.device)
            # Its tensors and not the storage itself, which is not to live on for what was captured of it.
            held = (storage.positions[:span], storage.keys, storage.values)
            known[key] = _Captured(inputs, lambda: action(inputs, *held), replay)
        return known[key]

    def _width(self, rows: int) -> int:
        if self._replay is None:
            return rows
        return next((width for width in WIDTHS if width >= rows), rows)


class _Captured:
    """An action on buffers of its own.

    Attributes:
        inputs: the buffers.
    """

    def __init__(self, inputs: Inputs, action: Callable[[], tuple[Tensor, ...]], replay: Replay) -> None:
        self.inputs = inputs
        self._action = action
        self._replay = replay
        self._again: Callable[[], tuple[Tensor, ...]] | None = None

    def run(self) -> tuple[Tensor, ...]:
        """The results, with what the buffers hold now; they hold until the next time."""
        if self._again is None:
            # Only now, with inputs that mean something: keys and values are written on the way.
            self._again = self._replay(self._action)
        return self._again()


def _empty(width: int, across: int, device: torch.device) -> Inputs:
    def whole(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    visible = torch.zeros(width, across, dtype=torch.bool, device=device)
    return Inputs(whole(width), whole(width), whole(), whole(), visible)


def _on(inputs: Inputs, device: torch.device) -> Inputs:
    return Inputs(*(getattr(inputs, field.name).to(device, non_blocking=True) for field in fields(inputs)))


def _span(length: int) -> int:
    """A number of slots that is rounded up."""
    unit = max(_SPAN, 1 << max(length.bit_length() - 3, 0))
    return -(-length // unit) * unit


def visible_slots(inputs: Inputs, span: int) -> Bool[Tensor, "W span"]:
    """Which slots each row attends to."""
    recent = torch.arange(span, device=inputs.first.device) - inputs.first
    across = inputs.visible.shape[1]
    within = (recent >= 0) & (recent < across)
    return (recent < 0) | (inputs.visible[:, recent.clamp(0, across - 1)] & within)
