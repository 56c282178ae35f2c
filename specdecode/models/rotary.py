"""Keys that were rotated for one position, rotated for another: what an eviction does to the keys that stay.

Rotary positions (Su et al. 2021) turn each pair of a key's components by an angle that grows with the position. Cached
keys are turned already, so a key that moves is turned back and turned again, with the very angles of the model's own
rotary module: it is then the key that the model would have written there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdecode.core.errors import UnsupportedModelError
from specdecode.core.slots import Slots

# Positions of one and the same token whose keys show how a layer rotates; far enough apart for every frequency to show.
_PROBED = (3, 41)
# Parts of transformers compute in float32 whatever the model's type.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# How a rotary module lays out what it gives for two pairs (0 and 1), and each pair's own.
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "0 1 0 1": lambda given: given[..., : given.shape[-1] // 2],
    "0 0 1 1": lambda given: given[..., ::2],
    "0 1": lambda given: given,
}


@dataclass(frozen=True, slots=True)
class Rotation:
    """How one layer rotates its keys.

    Attributes:
        module: gives cosines and sines of positions.
        arguments: of the module, behind the positions: the type of layer, where it asks for one.
        adjacent: components are paired with their neighbours (0 with 1); otherwise with those half the width away.
        layout: how the module lays out the pairs' cosines.
        last: the last components of a key are rotated; otherwise the first, if not all are.
        backwards: the pairs turn the other way.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    adjacent: bool
    layout: str
    last: bool
    backwards: bool

    def table(
        self, like: Tensor, positions: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n pairs"], Float[Tensor, "n pairs"]]:
        """Cosine and sine of each pair's angle at these positions, scaled as the model scales them."""
        given = self.module(like, positions[None], *self.arguments)
        # Some modules give complex numbers.
        cos, sin = (given.real, given.imag) if isinstance(given, Tensor) else given
        own = _LAYOUTS[self.layout]
        # A token may move a thousand times: nothing but the rounding of the result may add up.
        cos, sin = own(cos)[0].double(), own(sin)[0].double()
        return cos, -sin if self.backwards else sin

    def move(
        self,
        keys: Float[Tensor, "heads n dim"],
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "heads n dim"]:
        """Keys turned back by the angles of `before`, and on by those of `after`: each [n, pairs] or, by head,
        [heads, n, pairs]."""
        width = 2 * before[0].shape[-1]
        start = keys.shape[-1] - width if self.last else 0
        turned = keys[..., start : start + width].to(before[0].dtype)
        (cos, sin), (new_cos, new_sin) = before, after
        first, second = self._pairs(turned)
        norm = cos**2 + sin**2
        plain_first, plain_second = (first * cos + second * sin) / norm, (second * cos - first * sin) / norm
        moved = torch.empty_like(turned)
        moved_first, moved_second = self._pairs(moved)
        moved_first.copy_(plain_first * new_cos - plain_second * new_sin)
        moved_second.copy_(plain_second * new_cos + plain_first * new_sin)
        return torch.cat([keys[..., :start], moved.to(keys.dtype), keys[..., start + width :]], dim=-1)

    def _pairs(self, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the first and the second components of the pairs."""
        if self.adjacent:
            return turned[..., ::2], turned[..., 1::2]
        half = turned.shape[-1] // 2
        return turned[..., :half], turned[..., half:]


@torch.inference_mode()
def rotations(
    model: PreTrainedModel,
    held_at: Callable[[int], tuple[list[Float[Tensor, "heads 1 dim"]], list[Float[Tensor, "heads 1 width"]]]],
) -> list[Rotation | None]:
    """How each layer of a model rotates its keys; None for a layer whose keys do not depend on their position.

    Found out by looking: one and the same token alone, at two positions, has keys that differ by the rotation and by
    nothing else, in every layer.

    A model without any rotary module, but with an embedding of positions, has None everywhere: its keys cannot be
    moved, and stay as they are. What is decoded later takes positions within the cache all the same.

    Args:
        model: as transformers has it.
        held_at: the keys and the values of one token that is alone at a position, layer by layer.

    Raises:
        UnsupportedModelError: the keys depend on their position in a way that is not known here, or the values do too,
            as where a compressed cache holds what is rotated among them.
    """
    (before, values_before), (after, values_after) = (held_at(position) for position in _PROBED)
    known = list(_candidates(model))
    if not known and _embeds_positions(model):
        return [None] * len(before)
    for layer, (old, new) in enumerate(zip(values_before, values_after, strict=True)):
        if not _explains(None, old, new):
            raise UnsupportedModelError(
                f"a cache policy cannot serve this {model.config.model_type} model: what its layer {layer} stores as"
                " values depends on the position, so it cannot be moved"
            )
    found: list[Rotation | None] = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        fitting = [rotation for rotation in [None, *known] if _explains(rotation, old, new)]
        if not fitting:
            raise UnsupportedModelError(
                f"a cache policy cannot serve this {model.config.model_type} model: the keys of its layer {layer}"
                " depend on their position in a way that is not known, so they cannot be moved"
            )
        found.append(fitting[0])
    return found


def _candidates(model: PreTrainedModel) -> Iterator[Rotation]:
    types = sorted(set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()))
    for module in model.modules():
        buffers = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        if not buffers:
            continue
        # A module that knows several kinds of layers asks for one.
        kinds: list[tuple[str, ...]] = [(kind,) for kind in types if f"{kind}_inv_freq" in buffers]
        for arguments in kinds or [()]:
            either = (False, True)
            for adjacent, layout, last, backwards in product(either, _LAYOUTS, either, either):
                yield Rotation(module, arguments, adjacent, layout, last, backwards)


def _explains(rotation: Rotation | None, old: Tensor, new: Tensor) -> bool:
    if rotation is not None:
        tables = [rotation.table(old, torch.tensor([position], device=old.device)) for position in _PROBED]
        if 2 * tables[0][0].shape[-1] > old.shape[-1]:
            return False
        old = rotation.move(old, *tables)
    error = (old.double() - new.double()).abs().max() / new.double().std()
    return error.item() <= _TOLERANCE[new.dtype]


def _embeds_positions(model: PreTrainedModel) -> bool:
    """Whether there is an embedding with a row for each position; some have a few rows more."""
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit is not None and any(0 <= table.num_embeddings - limit <= 8 for table in tables)


class Mover:
    """Moves the keys of one model's slots to other positions.

    The angles are computed in double precision, but the keys stay in the model's type: in 16 bit each move rounds them
    once more.

    Args:
        rotations: of its layers.
    """

    def __init__(self, rotations: Sequence[Rotation | None]) -> None:
        self._rotations = rotations

    @torch.inference_mode()
    def evict(self, slots: Slots, kept: Int[Tensor, "... m"]) -> None:
        """Keep these slots, and give what stays the positions 0, 1, 2, ... in the cache.

        Before, each slot's position is its own number: that is so from the first eviction on, if it was at the start.

        Args:
            slots: hold committed tokens only.
            kept: ascending; the same slots of all heads and layers [m], or each head's own [layers, heads, m].
        """
        length = slots.length
        slots.gather(kept)
        everywhere = torch.arange(length, device=kept.device)
        tables: dict[Rotation, tuple[Tensor, Tensor]] = {}
        for layer, (keys, rotation) in enumerate(zip(slots.filled_keys(), self._rotations, strict=True)):
            if rotation is None:
                continue
            if rotation not in tables:
                tables[rotation] = rotation.table(keys, everywhere)
            cos, sin = tables[rotation]
            old = kept if kept.dim() == 1 else kept[layer]
            new = everywhere[: kept.shape[-1]]
            keys.copy_(rotation.move(keys, (cos[old], sin[old]), (cos[new], sin[new])))
