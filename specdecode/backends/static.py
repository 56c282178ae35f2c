"""Forwards over static shapes, so that each shape is captured or compiled only once.

In decoding, the number of rows of a forward and the number of slots that it attends to vary. Here both are rounded up
to one of a few sizes. Tensors hold the places where keys are written, and the slots that each row attends to. So the
same shapes recur. The same addresses recur too, as long as the slots keep their storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from specdecode.backends.static_inputs import StaticInputs, inputs_in
from specdecode.core.sampling import most_probable
from specdecode.core.slots import Slots, Storage
from specdecode.core.transfer import moved, write

# Rows of a forward: one token, drafts of usual lengths, and the largest tree with its root and the tokens of an
# accepted chain that are still to be read. Wider forwards read prompts.
WIDTHS = (1, 2, 4, 8, 16, 32, 48, 72)
# Rows of a forward over a prompt. A GPU runs its kernels faster than the host launches them one by one; a longer prompt
# keeps it busy.
PROMPT_WIDTHS = (128, 192, 256, 384, 512)
# Least rows of the first forward of a chain. Mostly it reads one token or two: so one graph serves both.
_CHAIN_ROWS = 2
# Recent slots beyond the widest forward are rounded up to a multiple of this, so that few shapes are captured.
_ROUNDED_ROWS = 32
# The number of slots that a forward attends to is rounded up to a multiple of this, and by a quarter at most.
_SPAN_MULTIPLE = 256
# Least slots of a storage: a growing storage needs new captures.
_LEAST_SLOTS = 1024
_ALL_WIDTHS = (*WIDTHS, *PROMPT_WIDTHS)
# Slots of a storage behind its text, for the padding of a forward.
_PADDING = max(wider - width for width, wider in pairwise(_ALL_WIDTHS))
# Number of unused storages that are kept for new slots.
_IDLE_STORAGES = 4
# Most cached graphs of one storage: each occupies memory.
_GRAPHS_PER_STORAGE = 64


StaticForward = Callable[
    [StaticInputs, Int[Tensor, " span"], Mapping[int, Tensor], Mapping[int, Tensor]], tuple[Tensor, ...]
]
"""A forward over static shapes. Arguments: its inputs, the positions of the slots that it attends to, and the keys and
values of each layer, which it writes. Returns tensors of W rows; the first tensor of a language model is its logits."""

Capture = Callable[[Callable[[], tuple[Tensor, ...]]], Callable[[], tuple[Tensor, ...]]]
"""A function that wraps a callable so that it replays on the current contents of the same tensors. Capturing may run
the callable, so the tensors must have meaningful contents. The results are valid until the next replay."""


class _GraphKey(NamedTuple):
    """The shape and the storage that a graph was captured for.

    Attributes:
        width: rows of the forward.
        across: number of slots that only some rows attend to.
        span: number of slots that the forward attends to.
        moves: `Storage.moves` at the capture.
        kind: distinguishes forwards of the same shape.
    """

    width: int
    across: int
    span: int
    moves: int
    kind: tuple[int | str, ...]


class StaticRunner:
    """Run the forwards of one model over static shapes.

    Args:
        forward: the forward over static shapes.
        capture: captures each shape once, with its own input buffers. None runs every forward directly, without
            rounding its shape.

    Attributes:
        forward: the forward itself. A longer forward may call it, and is then captured as one graph.
    """

    def __init__(self, forward: StaticForward, capture: Capture | None = None) -> None:
        self.forward = forward
        self._capture = capture
        self._idle: list[Storage] = []
        self._made = 0
        # Keys and values of no slots, by layer: the shapes, types and devices of the first storage that was written.
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._graphs: weakref.WeakKeyDictionary[Storage, dict[_GraphKey, _CachedGraph]] = weakref.WeakKeyDictionary()

    @torch.inference_mode()
    def new_slots(self, capacity: int, device: torch.device) -> Slots:
        """Return slots of at least this capacity, in an idle storage if there is one, so that its graphs are reused."""
        # The largest idle storage has the most captured shapes: its size does not change the span of a forward.
        storage = self._idle[0] if self._idle else None
        if storage is None or len(storage.positions) < capacity:
            storage = Storage.empty(_span(max(capacity, _LEAST_SLOTS) + _PADDING), device)
            storage.number = self._made = self._made + 1
            # With tensors the first forward of a text is static, as in a used storage: so it rounds the same in both.
            own_slots = 0 if self._capture else len(storage.positions)
            for layer, (keys, values) in self._layers.items():
                storage.keys[layer], storage.values[layer] = (
                    _with_slots(keys, own_slots),
                    _with_slots(values, own_slots),
                )
            if self._capture:
                storage.stack(0)
        else:
            self._idle.remove(storage)
            storage.clear()
        slots = Slots(capacity, device, storage)
        weakref.finalize(slots, self._put_back, storage)
        return slots

    def _put_back(self, storage: Storage) -> None:
        if storage.reusable:
            # A fixed order, whichever storage came back first: so the next text gets the same storages as this one.
            idle = sorted([*self._idle, storage], key=lambda idle: (-len(idle.positions), idle.number))
            self._idle = idle[:_IDLE_STORAGES]

    def span(self, slots: Slots) -> int:
        """Return the number of these slots that a forward attends to."""
        return slots.length if self._capture is None else min(_span(slots.length), slots.capacity)

    def takes(self, slots: Slots, rows: int) -> bool:
        """Return whether the forward of the last `rows` slots, which are already taken, can be static."""
        start = slots.length - rows
        # Without graphs a prompt is read faster by a forward that is not static, without a mask.
        most = WIDTHS[-1] if self._capture is None else PROMPT_WIDTHS[-1]
        return rows <= most and self._has_tensors(slots) and start + self._width(rows) <= slots.capacity

    def _has_tensors(self, slots: Slots) -> bool:
        """Return whether the slots have tensors for keys and values, which they keep. Remember those of the first that
        have."""
        storage = slots.storage
        if not storage.reusable:
            return False
        if self._capture and storage.keys and not storage.stacks:
            storage.stack(slots.length)
        if storage.keys and not self._layers:
            for layer, keys in storage.keys.items():
                self._layers[layer] = _with_slots(keys, 0), _with_slots(storage.values[layer], 0)
        return bool(storage.keys)

    def run(
        self,
        slots: Slots,
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        visible: Bool[Tensor, "n s"],
        states: Float[Tensor, "n F"] | None = None,
        *,
        rows: int | None = None,
        choose: bool = False,
    ) -> tuple[Shaped[Tensor, "_ ..."], ...]:
        """Run the forward of the tokens that take the last n slots.

        Args:
            slots: slots of the sequence, with the last n already taken.
            tokens: token ids. All tensors may be on any device.
            positions: positions of the tokens.
            visible: row i marks the slots among the last s that token i attends to; it attends to all slots before.
            states: hidden states that a draft head reads beside the tokens.
            rows: number of tokens at the end whose logits of a language model are needed; None for all.
            choose: return a language model's most probable tokens in place of its logits. Then all outputs are valid
                until the next replay.

        Returns:
            The forward's outputs for the n tokens. There may be logits for the last one alone, if no others are needed.
        """
        forward = self._choices if choose else self.forward
        if self._capture is None:
            start, first = (torch.tensor(slots.length - size) for size in visible.shape)
            inputs, storage = StaticInputs(tokens, positions, start, first, visible, states), slots.storage
            return forward(inputs.to(slots.device), slots.positions[: slots.length], storage.keys, storage.values)
        kind = ("choices",) if choose else ()
        # The logits of a whole prompt would take long, and much memory.
        if rows is not None and rows <= 1 and len(tokens) > WIDTHS[-1]:
            forward, kind = _of_the_last_row(forward), (*kind, "last")
        padded = self.replay(slots, tokens, positions, visible, states, forward=forward, kind=kind)
        outputs = tuple(output[: len(tokens)] for output in padded)
        return outputs if choose else tuple(output.clone() for output in outputs)

    def _choices(
        self, inputs: StaticInputs, positions: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
    ) -> tuple[Tensor, ...]:
        logits, *others = self.forward(inputs, positions, keys, values)
        return most_probable(logits), *others

    def replay(
        self,
        slots: Slots,
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        visible: Bool[Tensor, "n s"],
        states: Float[Tensor, "n F"] | None = None,
        *,
        forward: StaticForward,
        ahead: int = 0,
        least: int = 1,
        kind: tuple[int | str, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Replay the captured graph of a forward; capture it first if there is none for this shape and storage.

        Args:
            slots, tokens, positions, visible, states: see `run`.
            forward: the forward to capture.
            ahead: number of slots already taken behind those of the tokens. The forward writes them itself.
            least: least number of rows.
            kind: distinguishes forwards of the same shape.

        Returns:
            The forward's outputs, padded. They are valid until the next replay.
        """
        assert self._capture is not None
        count, recent = visible.shape
        end = slots.length - ahead
        width, across = self._width(max(count, least)), self._width(max(recent, least))
        graph = self._graph(slots, width, across, forward, self._capture, states, *kind)
        graph.fill(tokens, positions, end - count, end - recent, visible, states)
        return graph.run()

    def takes_chain(self, slots: Slots, rows: int, count: int) -> bool:
        """Return whether a greedy chain can be captured as one graph.

        Args:
            slots: slots of the sequence.
            rows: rows of the first forward, which are not in the slots yet.
            count: number of forwards after it, each over the token that the forward before chose.
        """
        if self._capture is None or rows > WIDTHS[-1] or not self._has_tensors(slots):
            return False
        return slots.length + max(self._width(max(rows, _CHAIN_ROWS)), rows + count) <= slots.capacity

    def chain(self, slots: Slots, tokens: Int[Tensor, " n"], count: int, vocab_size: int) -> Int[Tensor, " count"]:
        """Read tokens, then the model's own greedy choices below `vocab_size`. Return the choices; the last of them
        is not read."""
        assert self._capture is not None
        start, end = slots.length, slots.length + len(tokens)
        slots.append(torch.arange(start, end + count - 1))

        def forwards(
            inputs: StaticInputs, positions: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
        ) -> tuple[Tensor]:
            assert inputs.last is not None
            logits = self.forward(inputs, positions, keys, values)[0].index_select(0, inputs.last[None])
            chosen = [logits[:, :vocab_size].argmax(-1)]
            itself, last = torch.ones(1, 1, dtype=torch.bool, device=positions.device), inputs.start + inputs.last
            for ahead in range(1, count):
                place = last + ahead
                now = StaticInputs(chosen[-1], place[None], place, place, itself)
                chosen.append(self.forward(now, positions, keys, values)[0][:, :vocab_size].argmax(-1))
            return (torch.cat(chosen),)

        outputs = self.replay(
            slots,
            tokens,
            torch.arange(start, end),
            torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril(),
            forward=forwards,
            ahead=count - 1,
            # Tokens on the device do not fill the padding; see `_CachedGraph.fill`.
            least=_CHAIN_ROWS if tokens.device.type == "cpu" else 1,
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
        *kind: int | str,
    ) -> _CachedGraph:
        """Return the cached graph of a forward for a shape and a storage. A new graph is captured at its first run.

        Args:
            slots: the slots that the forward reads and writes.
            width: rows of the forward.
            across: number of slots that only some rows attend to.
            forward: the forward to capture.
            capture: captures the forward.
            states: states of the width and type that the forward reads.
            kind: distinguishes forwards of the same shape.
        """
        storage = slots.storage
        span = self.span(slots)
        graphs = self._graphs.setdefault(storage, {})
        key = _GraphKey(width, across, span, storage.moves, kind)
        if key not in graphs:
            for stale in [other for other in graphs if other.moves != storage.moves]:
                del graphs[stale]
            if len(graphs) >= _GRAPHS_PER_STORAGE:
                graphs.pop(next(iter(graphs)))
            # The graph refers to the tensors: a reference to the storage would keep it alive.
            tensors = (storage.positions[:span], storage.keys, storage.values)
            buffer = None if states is None else states.new_zeros(width, states.shape[1], device=slots.device)
            graphs[key] = _CachedGraph(
                width, across, slots.device, buffer, lambda inputs: forward(inputs, *tensors), capture
            )
        return graphs[key]

    def _width(self, rows: int) -> int:
        """Return the rows rounded up to a captured shape; beyond the widths of forwards, to one of a few."""
        if self._capture is None:
            return rows
        return next((width for width in _ALL_WIDTHS if width >= rows), -(-rows // _ROUNDED_ROWS) * _ROUNDED_ROWS)


class _CachedGraph:
    """The captured graph of a forward, with its input buffers.

    The inputs that come from the host are collected in host memory, and copied to the device together.

    Args:
        width: rows of the forward.
        across: number of slots that only some rows attend to.
        device: device of the buffers.
        states: buffer of the states that a draft head reads; None for a language model.
        forward: the forward over the buffers.
        capture: captures the forward.
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
        self._on_host = torch.zeros(8 * (2 * width + 3) + width * across, dtype=torch.uint8)
        self._on_device = moved(self._on_host, device).clone()
        self._host_inputs = inputs_in(self._on_host, width, across, states)
        self._inputs = inputs = inputs_in(self._on_device, width, across, states)
        self._state_rows = 0  # the rows of the last forward, if it read states
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
        (count, recent), host, inputs = visible.shape, self._host_inputs, self._inputs
        assert host.last is not None
        on_host = tokens.device.type == "cpu"
        self._on_host.zero_()
        if on_host:
            # Padding rows read a token of this forward: any other may overflow, and its NaN would spread.
            host.tokens.fill_(tokens[0])
            host.tokens[:count] = tokens
        host.positions[:count] = positions
        host.start.fill_(start)
        host.first.fill_(first)
        host.last.fill_(count - 1)
        host.visible[:count, :recent] = visible
        # Padding rows must attend to a slot within every window: without one, their attention and their keys are NaN.
        host.visible[count:, 0] = True
        # The host memory is not pinned, so the copy has read all of it on return. Later inputs may overwrite it.
        write(self._on_device, self._on_host)
        if not on_host:
            write(inputs.tokens[:count], tokens)
        if inputs.states is not None and states is not None:
            # For the same reason padding rows read no states of an earlier forward.
            if count < self._state_rows:
                inputs.states[count:].zero_()
            self._state_rows = count
            write(inputs.states[:count], states)

    def run(self) -> tuple[Tensor, ...]:
        """Return the outputs for the current contents of the buffers. They are valid until the next run."""
        if self._replay is None:
            # Capturing writes keys and values, so it waits until the inputs are meaningful.
            self._replay = self._capture(self._forward)
        return self._replay()


def _of_the_last_row(forward: StaticForward) -> StaticForward:
    """Return a forward with the logits of the last row that is not padding alone."""

    def run(
        inputs: StaticInputs, positions: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]
    ) -> tuple[Tensor, ...]:
        assert inputs.last is not None
        return forward(replace(inputs, wanted=inputs.last[None]), positions, keys, values)

    return run


def _with_slots(tensor: Float[Tensor, "1 heads _ dim"], capacity: int) -> Float[Tensor, "1 heads capacity dim"]:
    """Return zeros like a layer's keys or values, for another number of slots."""
    return tensor.new_zeros(1, tensor.shape[1], capacity, tensor.shape[3])


def _span(length: int) -> int:
    """Return a number of slots rounded up to a multiple of `_SPAN_MULTIPLE`, or of a larger power of two."""
    unit = max(_SPAN_MULTIPLE, 1 << max(length.bit_length() - 3, 0))
    return -(-length // unit) * unit
