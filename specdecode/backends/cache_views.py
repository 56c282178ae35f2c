"""The views of KV slots that take the place of a transformers cache in forwards over static shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor

SlotWrite = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""A function that writes the keys and values of one layer; its arguments are those of `write_to_slots`."""


def write_to_slots(
    keys: Shaped[Tensor, "1 heads n dim"],
    values: Shaped[Tensor, "1 shared n width"],
    layer_keys: Shaped[Tensor, "1 heads capacity dim"],
    layer_values: Shaped[Tensor, "1 shared capacity width"],
    places: Int[Tensor, " n"],
) -> None:
    """Write the keys and values of n tokens into slots of a layer.

    Args:
        keys: the keys of the tokens.
        values: the values of the tokens.
        layer_keys: the keys of all slots, of the same type and on the same device.
        layer_values: the values of all slots, likewise.
        places: the slots to write, each of them once.
    """
    layer_keys.index_copy_(2, places, keys)
    layer_values.index_copy_(2, places, values)


class LayerCacheView:
    """A static forward's view of one layer's slots, with the methods that a transformers layer calls on its cache.

    Attributes:
        keys: the keys of all slots.
        values: the values of all slots.
        places: the slots to write.
        positions: the positions of the slots to attend to, which are the first ones. Only their number is read.
        write: writes the keys and values.
    """

    is_initialized = True

    def __init__(
        self,
        keys: Float[Tensor, "1 heads capacity dim"],
        values: Float[Tensor, "1 heads capacity width"],
        places: Int[Tensor, " n"],
        positions: Int[Tensor, " span"],
        write: SlotWrite,
    ) -> None:
        self.keys, self.values = keys, values
        self.places, self.positions = places, positions
        self.write = write

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values of new slots, and return those of all slots to attend to."""
        span = len(self.positions)
        self.write(keys, values, self.keys, self.values, self.places)
        return self.keys[:, :, :span], self.values[:, :, :span]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: a captured length would be right in one step only. Models that need the length fail the probe."""
        return 0


class StaticCacheView:
    """A static forward's view of the slots, with the methods that a transformers model calls on its cache.

    Args:
        keys: the keys of all slots, by layer.
        values: the values of all slots, by layer.
        places: the slots to write.
        positions: the positions of the slots to attend to, which are the first ones.
        write: writes the keys and values of a layer.

    Attributes:
        layers: the layers that have slots. A layer that uses the keys of another one has none.
        places, positions: as above.
    """

    is_initialized = True

    def __init__(
        self,
        keys: Mapping[int, Float[Tensor, "1 heads capacity dim"]],
        values: Mapping[int, Float[Tensor, "1 heads capacity width"]],
        places: Int[Tensor, " n"],
        positions: Int[Tensor, " span"],
        write: SlotWrite,
    ) -> None:
        self._keys, self._values, self._write = keys, values, write
        self.layers = keys.keys()
        self.places, self.positions = places, positions

    def layer(self, layer: int) -> LayerCacheView:
        """Return the view of one layer."""
        return LayerCacheView(self._keys[layer], self._values[layer], self.places, self.positions, self._write)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values of one layer, and return its keys and values of all slots to attend to."""
        return self.layer(layer).update(keys, values)

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0, as `LayerCacheView.get_seq_length`."""
        return 0
