"""A static forward's view of the slots, in the form of a transformers model's cache."""

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


class StaticCacheView:
    """A static forward's view of the slots, with the methods that a transformers model calls on its cache.

    Args:
        keys: the keys of all slots, by layer.
        values: the values of all slots, by layer.
        places: the slots to write.
        span: number of slots to attend to, from the first on.
        write: writes the keys and values of a layer.
    """

    is_initialized = True

    def __init__(
        self,
        keys: Mapping[int, Float[Tensor, "1 heads capacity dim"]],
        values: Mapping[int, Float[Tensor, "1 heads capacity width"]],
        places: Int[Tensor, " n"],
        span: int,
        write: SlotWrite,
    ) -> None:
        self._keys, self._values = keys, values
        self._places, self._span = places, span
        self._write = write

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values of one layer, and return its keys and values of all slots to attend to."""
        layer_keys, layer_values = self._keys[layer], self._values[layer]
        self._write(keys, values, layer_keys, layer_values, self._places)
        return layer_keys[:, :, : self._span], layer_values[:, :, : self._span]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: a captured length would be right in one step only. Models that need the length fail the probe."""
        return 0
