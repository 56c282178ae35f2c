"""The KV slots of a sequence, the one operation on them: keep, and the slots of a batch side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(eq=False)
class Storage:
    """The tensors of slots. They may serve one sequence after another, where something is tied to their addresses.

    Attributes:
        positions: [capacity] see `Slots`.
        keys, values: of each layer that was written.
        moves: how often other tensors took the place of these, for more slots or in a batch.
    """

    positions: Int[Tensor, " capacity"]
    keys: dict[int, Float[Tensor, "1 heads capacity dim"]] = field(default_factory=dict)
    values: dict[int, Float[Tensor, "1 heads capacity width"]] = field(default_factory=dict)
    moves: int = 0

    @staticmethod
    @torch.inference_mode()
    def empty(capacity: int, device: torch.device) -> Storage:
        return Storage(torch.zeros(max(capacity, 1), dtype=torch.long, device=device))


class Slots:
    """Keys and values of one sequence, layer by layer, and the position of each.

    A transformers model writes here through `update`, `get_seq_length` and `is_initialized`, all that it asks of its
    cache. Slots are allocated at the first write and grown by doubling; those below `length` are filled.

    Args:
        capacity: slots to begin with.
        device: where they are.
        storage: of slots that are no longer used; by default a new one.

    Attributes:
        length: filled slots.
        attention: [layers, heads, capacity] the attention that each slot received from committed tokens, where it is
            counted (see `attend`); else empty.
        weights: [layers, heads, n, length] the attention of the last forward's n tokens, where the model records it.
        outputs: [n, hidden] of layers by their number, what they gave in the last forward, where the model records it.
        evicted: tokens that are no longer held, of those that were committed.
    """

    def __init__(self, capacity: int, device: torch.device, storage: Storage | None = None) -> None:
        self.length = 0
        self.storage = storage or Storage.empty(capacity, device)
        self._keys, self._values = self.storage.keys, self.storage.values
        self.attention: Float[Tensor, "layers heads capacity"] = torch.zeros(0, 0, 0, device=device)
        self.weights: Float[Tensor, "layers heads n length"] | None = None
        self.outputs: dict[int, Float[Tensor, "n hidden"]] = {}
        self.evicted = 0
        self._written = 0

    @property
    def positions(self) -> Int[Tensor, " capacity"]:
        """The position of each slot's token; the first `length` are meaningful."""
        return self.storage.positions

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def capacity(self) -> int:
        return len(self.positions)

    @property
    def committed(self) -> int:
        """Tokens that were ever kept: those that are held, and those that were evicted."""
        return self.length + self.evicted

    @property
    def bytes_held(self) -> int:
        """Bytes of the filled slots' keys and values over all layers."""
        tensors = (*self._keys.values(), *self._values.values())
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors) * self.length

    @torch.inference_mode()
    def append(self, positions: Int[Tensor, " n"]) -> None:
        """Take the next n slots for tokens at these positions; the forward that follows writes them."""
        if self.length + len(positions) > self.capacity:
            self.grow(max(self.length + len(positions), 2 * self.capacity))
        self._written = self.length
        self.length += len(positions)
        self.positions[self._written : self.length] = positions
        if self.attention.numel():
            self.attention[:, :, self._written : self.length] = 0.0

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Make room for this many slots."""
        wider = torch.zeros(capacity, dtype=torch.long, device=self.positions.device)
        wider[: self.capacity] = self.positions
        self.storage.positions = wider
        self.storage.moves += 1
        for layers in (self._keys, self._values):
            for layer, held in layers.items():
                layers[layer] = held.new_zeros(1, held.shape[1], capacity, held.shape[3])
                layers[layer][:, :, : self.length] = held[:, :, : self.length]
        if self.attention.numel():
            received = self.attention.new_zeros(*self.attention.shape[:2], capacity)
            received[:, :, : self.length] = self.attention[:, :, : self.length]
            self.attention = received

    def update(
        self,
        keys: Float[Tensor, "1 heads n dim"],
        values: Float[Tensor, "1 heads n width"],
        layer: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "1 heads length dim"], Float[Tensor, "1 heads length width"]]:
        """Write one layer's keys and values into the slots taken last; return all that the layer holds."""
        if layer not in self._keys:
            # Zeros, since static forwards multiply what was never written too, if only by an attention of zero.
            self._keys[layer] = keys.new_zeros(1, keys.shape[1], self.capacity, keys.shape[3])
            self._values[layer] = values.new_zeros(1, values.shape[1], self.capacity, values.shape[3])
        self.write(keys, values, layer)
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def write(self, keys: Float[Tensor, "1 heads n dim"], values: Float[Tensor, "1 heads n width"], layer: int) -> None:
        """Put one layer's keys and values into the slots taken last: those of the last tokens, of more than were
        taken."""
        count = self.length - self._written
        self._keys[layer][:, :, self._written : self.length] = keys[:, :, keys.shape[2] - count :]
        self._values[layer][:, :, self._written : self.length] = values[:, :, values.shape[2] - count :]

    def move(
        self, layer: int, keys: Float[Tensor, "1 heads capacity dim"], values: Float[Tensor, "1 heads capacity width"]
    ) -> None:
        """Hold one layer's keys and values in these tensors from now on."""
        if layer in self._keys:
            keys[:, :, : self._written] = self._keys[layer][:, :, : self._written]
            values[:, :, : self._written] = self._values[layer][:, :, : self._written]
        self._keys[layer], self._values[layer] = keys, values
        self.storage.moves += 1

    def filled_keys(self) -> list[Float[Tensor, "heads length dim"]]:
        """The filled slots' keys, layer by layer: views, which hold as long as the slots live."""
        return [self._keys[layer][0, :, : self.length] for layer in sorted(self._keys)]

    def filled_values(self) -> list[Float[Tensor, "heads length width"]]:
        """The same of the values."""
        return [self._values[layer][0, :, : self.length] for layer in sorted(self._values)]

    @torch.inference_mode()
    def gather(self, kept: Int[Tensor, "... m"]) -> None:
        """Evict all but these slots, ascending: the same of all heads and layers [m], or each head's own
        [layers, heads, m].

        What stays takes the first m slots, and their positions: from then on a slot need not be the same token in all
        heads.
        """
        count = kept.shape[-1]
        for tensors in (self._keys, self._values):
            for place, layer in enumerate(sorted(tensors)):
                held = tensors[layer][0]
                chosen = kept.expand(len(held), count) if kept.dim() == 1 else kept[place]
                held[:, :count] = held.gather(1, chosen[..., None].expand(-1, -1, held.shape[2]))
        if self.attention.numel():
            chosen = kept.expand(*self.attention.shape[:2], count)
            self.attention[:, :, :count] = self.attention.gather(2, chosen)
        self.evicted += self.length - count
        self.length = count

    @torch.inference_mode()
    def attend(self, rows: Sequence[int]) -> None:
        """Count the attention of these tokens of the last forward: the committed ones."""
        assert self.weights is not None
        received = self.weights[:, :, list(rows)].sum(2)
        if not self.attention.numel():
            self.attention = received.new_zeros(*received.shape[:2], self.capacity)
        self.attention[:, :, : self.length] += received

    def features(self, layers: Sequence[int]) -> Float[Tensor, "n F"]:
        """The recorded outputs of these layers, side by side."""
        return torch.cat([self.outputs[layer] for layer in layers], -1)

    def get_seq_length(self, layer: int = 0) -> int:
        """Slots filled before the forward under way."""
        return self._written

    @property
    def is_initialized(self) -> bool:
        """Whether anything was ever written."""
        return bool(self._keys)

    @torch.inference_mode()
    def keep(self, indices: Sequence[int], after: int = 0) -> None:
        """Of the slots from `after` on, keep only these, in this order; the ones below `after` all stay.

        Accepting a path, rolling back and evicting are all this operation. Where the kept slots lie already in place,
        only the length moves.

        Args:
            indices: slots to keep, ascending, each in [after, length).
            after: slots below this one are not touched.

        Raises:
            ValueError: an index is out of range or out of order.
        """
        if any(b <= a for a, b in zip((after - 1, *indices), (*indices, self.length), strict=False)):
            raise ValueError(f"slots to keep must ascend within [{after}, {self.length}), got {list(indices)}")
        in_place = next((i for i, slot in enumerate(indices) if slot != after + i), len(indices))
        moving = list(indices[in_place:])
        if moving:
            source = torch.tensor(moving, device=self.positions.device)
            target = slice(after + in_place, after + len(indices))
            self.positions[target] = self.positions[source]
            for held in (*self._keys.values(), *self._values.values()):
                held[:, :, target] = held[:, :, source]
            if self.attention.numel():
                self.attention[:, :, target] = self.attention[:, :, source]
        self.length = after + len(indices)


class SlotBatch:
    """Slots of several sequences side by side, so that one forward reads and writes all of them.

    Each sequence's keys and values become a row of tensors that all share; what is done to its slots afterwards is done
    there, in place. A batch lasts as long as its sequences stay the same: another one is made when one leaves or joins.

    Args:
        rows: the sequences, none of them in another batch that is still used.
    """

    def __init__(self, rows: Sequence[Slots]) -> None:
        self.rows = list(rows)
        self._shared: dict[
            int, tuple[Float[Tensor, "rows heads capacity dim"], Float[Tensor, "rows heads capacity width"]]
        ] = {}
        self._make_room(0)

    @property
    def length(self) -> int:
        """The most that any sequence has filled."""
        return max(slots.length for slots in self.rows)

    def append(self, positions: Sequence[Int[Tensor, " _"]]) -> None:
        """Take the next slots of each sequence, for tokens at these positions."""
        self._make_room(max(slots.length + len(own) for slots, own in zip(self.rows, positions, strict=True)))
        for slots, own in zip(self.rows, positions, strict=True):
            slots.append(own)

    def _make_room(self, needed: int) -> None:
        """All sequences have the same capacity, so that none of them outgrows the tensors that it shares."""
        capacity = max(slots.capacity for slots in self.rows)
        if needed > capacity:
            capacity = max(needed, 2 * capacity)
            self._shared = {}
        for slots in self.rows:
            if slots.capacity < capacity:
                slots.grow(capacity)

    def update(
        self,
        keys: Float[Tensor, "rows heads n dim"],
        values: Float[Tensor, "rows heads n width"],
        layer: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "rows heads length dim"], Float[Tensor, "rows heads length width"]]:
        """Write one layer's keys and values, those of padding (which stands first) left out; return all that the layer
        holds, each sequence's slots from the first on."""
        if layer not in self._shared:
            # Zeros, since what no sequence has written is multiplied too, if only by an attention of zero.
            shape = (len(self.rows), keys.shape[1], self.rows[0].capacity)
            self._shared[layer] = (keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3]))
            for row, slots in enumerate(self.rows):
                slots.move(layer, *(tensor[row : row + 1] for tensor in self._shared[layer]))
        for row, slots in enumerate(self.rows):
            slots.write(keys[row : row + 1], values[row : row + 1], layer)
        shared_keys, shared_values = self._shared[layer]
        return shared_keys[:, :, : self.length], shared_values[:, :, : self.length]

    def get_seq_length(self, layer: int = 0) -> int:
        """Slots filled before the forward under way, in the longest sequence."""
        return max(slots.get_seq_length() for slots in self.rows)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was ever written, of any sequence."""
        return any(slots.is_initialized for slots in self.rows)
