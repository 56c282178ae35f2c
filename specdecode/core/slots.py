"""The KV slots of one sequence, and of a batch of sequences. `keep` accepts a path or rolls back; `gather` evicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdecode.core.transfer import Copies, moved, picked, write


@dataclass(eq=False)
class Storage:
    """The tensors behind slots. One sequence after another may use them, as captured graphs need the same addresses.

    Attributes:
        positions: [capacity] position of each slot's token; see `Slots`.
        keys: keys of each layer that was written.
        values: values of each layer that was written.
        stacks: tensors of which all keys and values are views, if they were stacked; else empty.
        moves: number of times that other tensors replaced these, for more slots or for a batch.
        reusable: whether another sequence may use the tensors, and graphs may be captured for them: they are not, and
            will not become, rows of a batch's tensors.
        number: number of this storage among the storages of one runner.
        unchecked: whether values of the last text may be infinite or NaN: nobody has seen that its logits are finite.
    """

    positions: Int[Tensor, " capacity"]
    keys: dict[int, Float[Tensor, "1 heads capacity dim"]] = field(default_factory=dict)
    values: dict[int, Float[Tensor, "1 heads capacity width"]] = field(default_factory=dict)
    stacks: list[Float[Tensor, "n heads capacity _"]] = field(default_factory=list)
    moves: int = 0
    reusable: bool = True
    number: int = 0
    unchecked: bool = True

    @staticmethod
    @torch.inference_mode()
    def empty(capacity: int, device: torch.device) -> Storage:
        return Storage(torch.zeros(max(capacity, 1), dtype=torch.long, device=device))

    @property
    def tensors(self) -> list[Float[Tensor, "n heads capacity _"]]:
        """The tensors that hold all keys and values: as few as there are."""
        return self.stacks or [*self.keys.values(), *self.values.values()]

    @torch.inference_mode()
    def stack(self, filled: int) -> None:
        """Move keys and values of equal shape, type and device into one tensor with a slot for each position. Moving
        slots, as a tree does, then launches the same few kernels on a GPU for any number of layers.

        Args:
            filled: number of slots whose content stays, from the first on.
        """
        alike: dict[Any, list[tuple[dict[int, Tensor], int]]] = {}
        for layers in (self.keys, self.values):
            for layer, tensor in layers.items():
                alike.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append((layers, layer))
        self.stacks = []  # so that each old tensor is freed once its layers have moved
        for group in alike.values():
            tensor = group[0][0][group[0][1]]
            stack = tensor.new_zeros(len(group), tensor.shape[1], len(self.positions), tensor.shape[3])
            for row, (layers, layer) in enumerate(group):
                stack[row, :, :filled] = layers[layer][0, :, :filled]
                layers[layer] = stack[row : row + 1]
            self.stacks.append(stack)
        self.moves += 1

    @torch.inference_mode()
    def clear(self) -> None:
        """Make ready for another text: overwrite unchecked values. Static forwards read slots beyond theirs, where a
        NaN would spread."""
        if self.unchecked:
            for tensor in self.tensors:
                tensor.zero_()
        self.unchecked = True


class Slots:
    """The KV cache of one sequence: keys and values by layer, and the position of each token.

    A transformers model accepts the slots as its cache: it calls only `update`, `get_seq_length` and `is_initialized`.
    Memory is allocated at the first write, and doubled when it is full. Slots below `length` are filled.

    A model's layers may lie on several devices. Keys and values are on the device of their layer, and everything else
    on that of the slots.

    Args:
        capacity: number of slots to begin with.
        device: device of the slots.
        storage: the storage of unused slots, to use again; by default a new one.

    Attributes:
        length: number of filled slots.
        attention: [layers, heads, capacity] the sum of the attention weights that each slot received from committed
            tokens, if it is counted (see `attend`); else empty.
        weights: [layers, heads, n, length] the attention weights of the last forward's n tokens, if they are recorded.
        outputs: [n, hidden] the hidden states of the last forward by layer, if they are recorded.
        attended: number of slots that the target's last forward attended to: those that were filled, or a few more over
            static shapes and beside a longer sequence of a batch.
        evicted: number of committed tokens that are no longer in the slots.
    """

    def __init__(self, capacity: int, device: torch.device, storage: Storage | None = None) -> None:
        self.length = 0
        self.storage = storage or Storage.empty(capacity, device)
        self._keys, self._values = self.storage.keys, self.storage.values
        self.attention: Float[Tensor, "layers heads capacity"] = torch.zeros(0, 0, 0, device=device)
        self.weights: Float[Tensor, "layers heads n length"] | None = None
        self.outputs: dict[int, Float[Tensor, "n hidden"]] = {}
        self.attended = 0
        self.evicted = 0
        self._written = 0

    @property
    def positions(self) -> Int[Tensor, " capacity"]:
        """The position of each slot's token. Only the first `length` entries are valid."""
        return self.storage.positions

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def capacity(self) -> int:
        return len(self.positions)

    @property
    def committed(self) -> int:
        """Number of committed tokens, in the slots and evicted."""
        return self.length + self.evicted

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values in the filled slots, over all layers."""
        tensors = self.storage.tensors
        return sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in tensors) * self.length

    @torch.inference_mode()
    def append(self, positions: Int[Tensor, " n"]) -> None:
        """Reserve the next n slots. The next forward writes them.

        Args:
            positions: positions of the n tokens, on any device.
        """
        if self.length + len(positions) > self.capacity:
            self.grow(max(self.length + len(positions), 2 * self.capacity))
        self._written = self.length
        self.length += len(positions)
        write(self.positions[self._written : self.length], positions)
        if self.attention.numel():
            self.attention[:, :, self._written : self.length] = 0.0

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Enlarge the storage to this many slots."""
        wider = torch.zeros(capacity, dtype=torch.long, device=self.positions.device)
        wider[: self.capacity] = self.positions
        self.storage.positions = wider
        self.storage.moves += 1
        if self.storage.stacks:
            self.storage.stack(self.length)
        else:
            for layers in (self._keys, self._values):
                for layer, tensor in layers.items():
                    layers[layer] = tensor.new_zeros(1, tensor.shape[1], capacity, tensor.shape[3])
                    layers[layer][:, :, : self.length] = tensor[:, :, : self.length]
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
        """Write one layer's keys and values into the slots that were reserved last.

        Returns:
            The keys and the values of all filled slots of that layer.
        """
        if layer not in self._keys:
            # Zeros, since static forwards also read slots that were never written, with an attention weight of zero.
            self._keys[layer] = keys.new_zeros(1, keys.shape[1], self.capacity, keys.shape[3])
            self._values[layer] = values.new_zeros(1, values.shape[1], self.capacity, values.shape[3])
            self.storage.stacks = []
        self._keys[layer][:, :, self._written : self.length] = keys
        self._values[layer][:, :, self._written : self.length] = values
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def move(
        self, layer: int, keys: Float[Tensor, "1 heads capacity dim"], values: Float[Tensor, "1 heads capacity width"]
    ) -> None:
        """Copy one layer's keys and values into other tensors, and use those tensors from now on."""
        if layer in self._keys:
            keys[:, :, : self._written] = self._keys[layer][:, :, : self._written]
            values[:, :, : self._written] = self._values[layer][:, :, : self._written]
        self._keys[layer], self._values[layer] = keys, values
        self.storage.stacks = []
        self.storage.moves += 1
        self.storage.reusable = False

    def filled_keys(self) -> list[Float[Tensor, "heads length dim"]]:
        """Return views of the filled slots' keys, layer by layer."""
        return [self._keys[layer][0, :, : self.length] for layer in sorted(self._keys)]

    def filled_values(self) -> list[Float[Tensor, "heads length width"]]:
        """Return views of the filled slots' values, layer by layer."""
        return [self._values[layer][0, :, : self.length] for layer in sorted(self._values)]

    @torch.inference_mode()
    def gather(self, kept: Int[Tensor, "... m"]) -> None:
        """Evict all slots except the given ones, which move to the first m slots and get the positions of those slots.

        Args:
            kept: slots that stay, ascending: one selection for all heads and layers [m], or one for each head
                [layers, heads, m]. With a selection for each head, one slot may hold different tokens in different
                heads.
        """
        count, copies = kept.shape[-1], Copies(kept)
        for tensors in (self._keys, self._values):
            for place, layer in enumerate(sorted(tensors)):
                tensor = tensors[layer][0]
                there = copies[tensor.device]
                chosen = there.expand(len(tensor), count) if kept.dim() == 1 else there[place]
                tensor[:, :count] = tensor.gather(1, chosen[..., None].expand(-1, -1, tensor.shape[2]))
        if self.attention.numel():
            chosen = kept.expand(*self.attention.shape[:2], count)
            self.attention[:, :, :count] = self.attention.gather(2, chosen)
        self.evicted += self.length - count
        self.length = count

    @torch.inference_mode()
    def attend(self, rows: Sequence[int]) -> None:
        """Add the last forward's attention weights to `attention`.

        Args:
            rows: rows of the forward that belong to committed tokens.
        """
        assert self.weights is not None
        received = picked(self.weights, rows, dim=2).sum(2)
        if not self.attention.numel():
            self.attention = received.new_zeros(*received.shape[:2], self.capacity)
        self.attention[:, :, : self.length] += received

    def hidden_states(self, layers: Sequence[int]) -> Float[Tensor, "n F"]:
        """Return the recorded hidden states of these layers, concatenated to F = len(layers) * hidden columns."""
        return torch.cat([self.outputs[layer] for layer in layers], -1)

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of slots that were filled before the current forward. transformers calls this."""
        return self._written

    @property
    def is_initialized(self) -> bool:
        """Whether any layer was written."""
        return bool(self._keys)

    @torch.inference_mode()
    def keep(self, indices: Sequence[int], after: int = 0) -> None:
        """Keep only the given slots among those from `after` on. All slots below `after` stay.

        Accepting a path and rolling back are both this operation. Slots that are already in place are not copied: then
        only the length changes.

        Args:
            indices: slots to keep, ascending, each in [after, length).
            after: first slot that may be dropped.

        Raises:
            ValueError: an index is out of range or out of order.
        """
        if any(b <= a for a, b in zip((after - 1, *indices), (*indices, self.length), strict=False)):
            raise ValueError(f"slots to keep must ascend within [{after}, {self.length}), got {list(indices)}")
        in_place = next((i for i, slot in enumerate(indices) if slot != after + i), len(indices))
        moving = list(indices[in_place:])
        if moving:
            source = moved(torch.tensor(moving), self.device)
            target, sources = slice(after + in_place, after + len(indices)), Copies(source)
            self.positions[target] = self.positions[source]
            for tensor in self.storage.tensors:
                tensor[:, :, target] = tensor[:, :, sources[tensor.device]]
            if self.attention.numel():
                self.attention[:, :, target] = self.attention[:, :, source]
        self.length = after + len(indices)

    @torch.inference_mode()
    def erase_dropped(self) -> None:
        """Overwrite all slots that are not filled. Static forwards and batches read some of them."""
        for tensor in self.storage.tensors:
            tensor[:, :, self.length :] = 0


class SlotBatch:
    """The slots of several sequences together, so that one forward reads and writes all of them.

    Each sequence's keys and values become a row of shared tensors. Later operations on the sequence's slots change that
    row in place. When a sequence leaves or joins, a new batch is needed.

    Args:
        rows: the slots of the sequences. None of them may be in another batch that is still used.
    """

    def __init__(self, rows: Sequence[Slots]) -> None:
        self.rows = list(rows)
        self._shared: dict[
            int, tuple[Float[Tensor, "rows heads capacity dim"], Float[Tensor, "rows heads capacity width"]]
        ] = {}
        self._make_room(0)

    @staticmethod
    def new_row(capacity: int, device: torch.device) -> Slots:
        """Return empty slots of a sequence that will join a batch. No graph is captured for their own tensors, which
        the batch replaces."""
        slots = Slots(capacity, device)
        slots.storage.reusable = False
        return slots

    @property
    def length(self) -> int:
        """Number of filled slots of the longest sequence."""
        return max(slots.length for slots in self.rows)

    def append(self, positions: Sequence[Int[Tensor, " _"]]) -> None:
        """Reserve the next slots of each sequence.

        Args:
            positions: positions of the new tokens of each sequence.
        """
        self._make_room(max(slots.length + len(new) for slots, new in zip(self.rows, positions, strict=True)))
        # The row of each new token, its slot, and its place from the end: padding comes first.
        places: list[tuple[int, int, int]] = []
        for row, (slots, new) in enumerate(zip(self.rows, positions, strict=True)):
            places += [(row, slots.length + i, i - len(new)) for i in range(len(new))]
            slots.append(new)
        self._places = Copies(torch.tensor(places).T)

    def _make_room(self, needed: int) -> None:
        """Give all sequences the same capacity of at least `needed` slots, so that none outgrows the shared tensors."""
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
        """Write one layer's keys and values into the slots that were reserved last. Padding, which comes first, is left
        out.

        Returns:
            The layer's keys and values, with the number of filled slots of the longest sequence for each sequence.
        """
        if layer not in self._shared:
            # Zeros, since forwards also read slots that no sequence has written, with an attention weight of zero.
            shape = (len(self.rows), keys.shape[1], self.rows[0].capacity)
            self._shared[layer] = (keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3]))
            for row, slots in enumerate(self.rows):
                slots.move(layer, *(tensor[row : row + 1] for tensor in self._shared[layer]))
        shared_keys, shared_values = self._shared[layer]
        row, slot, place = self._places[keys.device]
        shared_keys[row, :, slot] = keys[row, :, place]
        shared_values[row, :, slot] = values[row, :, place]
        return shared_keys[:, :, : self.length], shared_values[:, :, : self.length]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of slots that were filled before the current forward, in the longest sequence."""
        return max(slots.get_seq_length() for slots in self.rows)

    @property
    def is_initialized(self) -> bool:
        """Whether any layer of any sequence was written."""
        return any(slots.is_initialized for slots in self.rows)
