"""Forwards over static shapes, so that each is captured or compiled only once.

In decoding, the rows of a forward and the slots that it attends to vary. Here both are rounded up to one of a few
sizes. Tensors hold where keys are written and which slots a row attends to. So the same shapes occur again and again.
The same addresses do too, as long as the slots keep their storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from specdecode.core.slots import Slots, Storage
from specdecode.core.transfer import moved, write

# Rows of a forward: a token, drafts of usual lengths, and the largest tree with its root and what an accepted chain
# leaves to read. Wider forwards, which read prompts, are no static ones.
WIDTHS = (1, 2, 4, 8, 16, 32, 48, 72)
# Slots that a forward attends to are rounded up to a multiple of this, and by a quarter at most.
_SPAN_MULTIPLE = 256
# A storage has at least so many slots: one that grows is captured anew.
_LEAST_SLOTS = 1024
# Unused storages that are kept for new slots.
_IDLE_STORAGES = 4
# Cached graphs for one storage: each of them takes memory.
_GRAPHS_PER_STORAGE = 64


class StaticCacheView:
    """Give a static forward its view of the slots, with the methods that a transformers model calls on its cache.

    Args:
        keys: of all slots, by layer.
        values: likewise.
        places: the slots to write.
        span: number of slots to attend to, from the first on.
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
        """Write one layer's keys and values, and return those of all slots to attend to."""
        layer_keys, layer_values = self._keys[layer], self._values[layer]
        layer_keys.index_copy_(2, self._places, keys)
        layer_values.index_copy_(2, self._places, values)
        return layer_keys[:, :, : self._span], layer_values[:, :, : self._span]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: a number would be captured, and be right in one step only. Models that need it fail the probe."""
        return 0


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """Hold what changes from one static forward to the next, padded at the end to W rows and S slots.

    Attributes:
        tokens: [W] token ids.
        positions: [W] of the tokens.
        start: slot of the first token; the others follow.
        first: first slot that some row does not attend to; all rows attend to those before it.
        visible: [W, S] which of the slots from `first` on each row attends to.
        states: [W, F] that a draft head reads beside the tokens; None for a language model.
    """

    tokens: Int[Tensor, " W"]
    positions: Int[Tensor, " W"]
    start: Int[Tensor, ""]
    first: Int[Tensor, ""]
    visible: Bool[Tensor, "W S"]
    states: Float[Tensor, "W F"] | None = None


StaticForward = Callable[
    [StaticInputs, Int[Tensor, " span"], Mapping[int, Tensor], Mapping[int, Tensor]], tuple[Tensor, ...]
]
"""A forward over static shapes. Arguments: its inputs, the positions of the slots that it attends to, and the keys and
values of each layer, which it writes. Returns tensors of its W rows; a language model's first one are its logits."""

Capture = Callable[[Callable[[], tuple[Tensor, ...]]], Callable[[], tuple[Tensor, ...]]]
"""Wraps a callable so that it replays on the current contents of the same tensors. To capture it, the callable may be
run, so the tensors must have meaningful contents. The results are valid until the next replay."""


class StaticRunner:
    """Run the forwards of one model over static shapes.

    Args:
        forward: over static shapes.
        capture: captures each shape once, with input buffers for it. None runs every forward directly, over shapes
            that are not rounded.
    """

    def __init__(self, forward: StaticForward, capture: Capture | None = None) -> None:
        self._forward = forward
        self._capture = capture
        self._idle: list[Storage] = []
        self._made = 0
        self._graphs: weakref.WeakKeyDictionary[Storage, dict[tuple[int, ...], _CachedGraph]] = (
            weakref.WeakKeyDictionary()
        )

    def new_slots(self, capacity: int, device: torch.device) -> Slots:
        """Return slots of at least this capacity, in an idle storage if there is one: its graphs serve again."""
        # The largest, as most shapes were captured for it: what a forward attends to does not depend on its size.
        storage = self._idle[0] if self._idle else None
        if storage is None or len(storage.positions) < capacity:
            storage = Storage.empty(_span(max(capacity, _LEAST_SLOTS) + WIDTHS[-1]), device)
            storage.number = self._made = self._made + 1
        else:
            self._idle.remove(storage)
        slots = Slots(capacity, device, storage)
        weakref.finalize(slots, self._put_back, storage)
        return slots

    def _put_back(self, storage: Storage) -> None:
        if not storage.shared:
            # In one order, whichever came back first: so the next text finds them as this one did.
            idle = sorted([*self._idle, storage], key=lambda idle: (-len(idle.positions), idle.number))
            self._idle = idle[:_IDLE_STORAGES]

    def span(self, slots: Slots) -> int:
        """Return how many of these slots a forward attends to."""
        return slots.length if self._capture is None else min(_span(slots.length), slots.capacity)

    def takes(self, slots: Slots, rows: int) -> bool:
        """Return whether the forward of the last `rows` slots, already taken, can be a static one."""
        start = slots.length - rows
        return rows <= WIDTHS[-1] and bool(slots.storage.keys) and start + self._width(rows) <= slots.capacity

    def run(
        self,
        slots: Slots,
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        visible: Bool[Tensor, "n s"],
        states: Float[Tensor, "n F"] | None = None,
    ) -> tuple[Shaped[Tensor, "n _"], ...]:
        """Run the forward of the tokens that take the last n slots.

        Args:
            slots: with the last n already taken.
            tokens: on any device, as the other tensors.
            positions: of the tokens.
            visible: row i marks which of the last s slots token i attends to; it attends to all slots before those.
            states: that a draft head reads beside the tokens.

        Returns:
            The forward's outputs for the n tokens.
        """
        if self._capture is None:
            start, first = (torch.tensor(slots.length - size) for size in visible.shape)
            inputs, storage = StaticInputs(tokens, positions, start, first, visible, states), slots.storage
            return self._forward(
                _on_device(inputs, slots.device), slots.positions[: slots.length], storage.keys, storage.values
            )
        outputs = self.replay(slots, tokens, positions, visible, states)
        return tuple(output[: len(tokens)].clone() for output in outputs)

    def replay(
        self,
        slots: Slots,
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        visible: Bool[Tensor, "n s"],
        states: Float[Tensor, "n F"] | None = None,
        *,
        forward: StaticForward | None = None,
        ahead: int = 0,
        kind: tuple[int, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Replay the captured graph of a forward; capture it first if there is none for this shape and storage.

        Args:
            slots, tokens, positions, visible, states: see `run`.
            forward: to capture; by default the runner's.
            ahead: slots that are taken already behind those of the tokens. The forward writes them itself.
            kind: distinguishes forwards of the same shape.

        Returns:
            The forward's outputs, padded. They are valid until the next replay.
        """
        assert self._capture is not None
        count, recent = visible.shape
        end = slots.length - ahead
        width, across = self._width(count), max(self._width(recent), recent)
        graph = self._graph(slots, width, across, forward or self._forward, self._capture, states, *kind)
        graph.fill(tokens, positions, end - count, end - recent, visible, states)
        return graph.run()

    def takes_chain(self, slots: Slots, rows: int, count: int) -> bool:
        """Return whether a greedy chain can be captured as one graph.

        Args:
            slots: of the sequence.
            rows: of the first forward, which are not in the slots yet.
            count: of the forwards after it, each over the choice of the one before.
        """
        if self._capture is None or rows > WIDTHS[-1] or not slots.storage.keys:
            return False
        return slots.length + max(self._width(rows), rows + count) <= slots.capacity

    def chain(self, slots: Slots, token: Int[Tensor, " 1"], count: int, vocab_size: int) -> Int[Tensor, " count"]:
        """Read a token and then the model's own choices below `vocab_size`; return them. The last is not read."""
        assert self._capture is not None
        start = slots.length
        slots.append(torch.arange(start, start + count))

        def forwards(
            inputs: StaticInputs, positions: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
        ) -> tuple[Tensor]:
            token, chosen = inputs.tokens, []
            for ahead in range(count):
                place = inputs.start + ahead
                now = StaticInputs(token, place[None], place, place, inputs.visible)
                token = self._forward(now, positions, keys, values)[0][:, :vocab_size].argmax(-1)
                chosen.append(token)
            return (torch.cat(chosen),)

        itself = torch.ones(1, 1, dtype=torch.bool)
        outputs = self.replay(
            slots,
            token,
            torch.tensor([start]),
            itself,
            forward=forwards,
            ahead=count - 1,
            kind=(count, vocab_size),
        )
        return outputs[0].clone()

    def _graph(
        self,
        slots: Slots,
        width: int,
        across: int,
        forward: StaticForward,
        capture: Capture,
        states: Tensor | None,
        *kind: int,
    ) -> _CachedGraph:
        """Return the cached graph of a forward for a captured shape and storage; a new one is captured when first run.

        Args:
            slots: that the forward reads and writes.
            width: rows of the forward.
            across: slots that the rows see in part.
            forward: to capture.
            capture: captures it.
            states: of the width and type that the forward reads.
            kind: distinguishes forwards of the same shape.
        """
        storage = slots.storage
        span = self.span(slots)
        graphs = self._graphs.setdefault(storage, {})
        key = (width, across, span, storage.moves, *kind)
        if key not in graphs:
            for stale in [other for other in graphs if other[3] != storage.moves]:
                del graphs[stale]
            if len(graphs) >= _GRAPHS_PER_STORAGE:
                graphs.pop(next(iter(graphs)))
            # The graph refers to the tensors and not to the storage, which it would otherwise keep alive.
            tensors = (storage.positions[:span], storage.keys, storage.values)
            buffer = None if states is None else states.new_zeros(width, states.shape[1], device=slots.device)
            graphs[key] = _CachedGraph(
                width, across, slots.device, buffer, lambda inputs: forward(inputs, *tensors), capture
            )
        return graphs[key]

    def _width(self, rows: int) -> int:
        """Return the rows rounded up to a captured shape."""
        if self._capture is None:
            return rows
        return next((width for width in WIDTHS if width >= rows), rows)


class _CachedGraph:
    """Hold the captured graph of a forward, with its input buffers.

    What the host knows of the inputs is written to memory of the host, and copied to the device at once.

    Args:
        width: rows of the forward.
        across: slots that the rows see in part.
        device: of the buffers.
        states: buffer of the states that a draft head reads; None for a language model.
        forward: over the buffers.
        capture: captures it.
    """

    def __init__(
        self,
        width: int,
        across: int,
        device: torch.device,
        states: Float[Tensor, "W F"] | None,
        forward: Callable[[StaticInputs], tuple[Tensor, ...]],
        capture: Capture,
    ) -> None:
        self._on_host = torch.zeros(8 * (width + 2) + width * across, dtype=torch.uint8)
        self._on_device = moved(self._on_host, device).clone()
        self._tokens = torch.zeros(width, dtype=torch.long, device=device)
        self._states = states
        self._host_inputs, inputs = (
            _inputs_in(buffer, self._tokens, across, states) for buffer in (self._on_host, self._on_device)
        )
        self._forward = lambda: forward(inputs)
        self._capture = capture
        self._replay: Callable[[], tuple[Tensor, ...]] | None = None

    def fill(
        self,
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        start: int,
        first: int,
        visible: Bool[Tensor, "n s"],
        states: Float[Tensor, "n F"] | None = None,
    ) -> None:
        """Set the inputs; see `StaticInputs`. Rows beyond n, and slots beyond s, are padding."""
        (count, recent), host = visible.shape, self._host_inputs
        host.positions.zero_()
        host.positions[:count] = positions
        host.start.fill_(start)
        host.first.fill_(first)
        host.visible.zero_()
        host.visible[:count, :recent] = visible
        # Padding must attend to a slot within every window: attention to none is NaN, and so are the keys written.
        host.visible[count:, 0] = True
        # The copy has left the host's memory when it returns, as that is not pinned: the next may be written there.
        write(self._on_device, self._on_host)
        write(self._tokens[:count], tokens)
        if self._states is not None and states is not None:
            write(self._states[:count], states)

    def run(self) -> tuple[Tensor, ...]:
        """Return the outputs for the current contents of the buffers. They are valid until the next run."""
        if self._replay is None:
            # Captured only now, with meaningful inputs: capturing writes keys and values.
            self._replay = self._capture(self._forward)
        return self._replay()


def _inputs_in(
    buffer: UInt8[Tensor, " bytes"], tokens: Int[Tensor, " W"], across: int, states: Float[Tensor, "W F"] | None
) -> StaticInputs:
    """Return the inputs that lie in a buffer, and the tokens, which may come from a draft on the device."""
    width = len(tokens)
    numbers, visible = buffer[: 8 * (width + 2)].view(torch.long), buffer[8 * (width + 2) :].view(torch.bool)
    return StaticInputs(
        tokens, numbers[:width], numbers[width], numbers[width + 1], visible.view(width, across), states
    )


def _on_device(inputs: StaticInputs, device: torch.device) -> StaticInputs:
    tensors = [moved(tensor, device) for field in fields(inputs) if (tensor := getattr(inputs, field.name)) is not None]
    return StaticInputs(*tensors)


def _span(length: int) -> int:
    """Return a number of slots rounded up to a multiple of `_SPAN_MULTIPLE`, or of a larger power of two."""
    unit = max(_SPAN_MULTIPLE, 1 << max(length.bit_length() - 3, 0))
    return -(-length // unit) * unit


def visible_slots(inputs: StaticInputs, span: int) -> Bool[Tensor, "W span"]:
    """Return which of the first `span` slots each row attends to."""
    recent = torch.arange(span, device=inputs.first.device) - inputs.first
    across = inputs.visible.shape[1]
    within = (recent >= 0) & (recent < across)
    return (recent < 0) | (inputs.visible[:, recent.clamp(0, across - 1)] & within)
