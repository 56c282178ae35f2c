"""KV re-rotation: after an eviction, the keys that stay are rotated to their new positions in the cache.

Rotary positions (Su et al. 2021) rotate each pair of a key's components by an angle that grows with the position.
Cached keys are rotated already. So a key is rotated back by its old angles, and then forward by the angles of its new
position. Both come from the model's own rotary module. The result is the key that the model would have written there.
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

from specdecode.backends.layers import text_decoder
from specdecode.core.errors import UnsupportedModelError
from specdecode.core.slots import Slots
from specdecode.core.transfer import Copies, moved
from specdecode.models.forwards import SlotDecoder

# Two positions of one token, whose keys show the rotation of a layer. They are far enough apart for every frequency to
# have an effect.
_PROBED_POSITIONS = (3, 41)
# Largest error of a re-rotated key, in standard deviations of the key's components. The bound for float64 is loose,
# since parts of transformers compute in float32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Layouts of a rotary module's output, written for two pairs (0 and 1), with a function that gives one value per pair.
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "0 1 0 1": lambda output: output[..., : output.shape[-1] // 2],
    "0 0 1 1": lambda output: output[..., ::2],
    "0 1": lambda output: output,
}


@dataclass(frozen=True, slots=True)
class Rotation:
    """The way in which one layer rotates its keys.

    Attributes:
        module: rotary module, which returns cosines and sines for positions.
        arguments: arguments of the module after the positions: the type of layer, if the module needs it.
        adjacent: whether components are paired with their neighbours (0 with 1); otherwise with the components half the
            rotated width away.
        layout: key of `_LAYOUTS`: the layout of the module's output.
        last: whether the last components are rotated, if a part of the key is rotated; otherwise the first components.
        backwards: whether the pairs rotate in the opposite direction.
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
        """Return cosine and sine of each pair's angle at these positions, in float64, with the model's own scaling.

        Args:
            like: a tensor with the type of the module's output. The result is on its device; the module may be on
                another.
            positions: positions of tokens.
        """
        output = self.module(like, positions[None], *self.arguments)
        # Some modules return complex numbers.
        cos, sin = (output.real, output.imag) if isinstance(output, Tensor) else output
        by_pair = _LAYOUTS[self.layout]
        # In float64, since a key may be re-rotated a thousand times: only the rounding of the stored keys may add up.
        cos, sin = (moved(by_pair(table)[0].double(), like.device) for table in (cos, sin))
        return cos, -sin if self.backwards else sin

    def rerotate(
        self,
        keys: Float[Tensor, "heads n dim"],
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "heads n dim"]:
        """Rotate keys back by the angles of `before`, and then forward by the angles of `after`.

        Args:
            keys: rotated keys.
            before: cosines and sines of the old positions, each [n, pairs] or, by head, [heads, n, pairs].
            after: cosines and sines of the new positions, likewise.

        Returns:
            The keys at the new positions, in the type of `keys`.
        """
        return self.rotate(keys, _between(before, after))

    def rotate(self, keys: Float[Tensor, "heads n dim"], angles: tuple[Tensor, Tensor]) -> Float[Tensor, "heads n dim"]:
        """Rotate keys by angles, given as cosines and sines, each [n, pairs] or, by head, [heads, n, pairs]."""
        cos, sin = angles
        width = 2 * cos.shape[-1]
        start = keys.shape[-1] - width if self.last else 0
        rotated = keys[..., start : start + width].to(cos.dtype)
        first, second = self._pairs(rotated)
        rerotated = torch.empty_like(rotated)
        new_first, new_second = self._pairs(rerotated)
        new_first.copy_(first * cos - second * sin)
        new_second.copy_(second * cos + first * sin)
        return torch.cat([keys[..., :start], rerotated.to(keys.dtype), keys[..., start + width :]], dim=-1)

    def _pairs(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of the first components and of the second components of all pairs."""
        if self.adjacent:
            return components[..., ::2], components[..., 1::2]
        half = components.shape[-1] // 2
        return components[..., :half], components[..., half:]


def _between(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles from those of `before` to those of `after`; see `Rotation.rerotate`.

    The model's scaling of cosines and sines is divided out.
    """
    (cos, sin), (new_cos, new_sin) = before, after
    norm = cos**2 + sin**2
    return (cos * new_cos + sin * new_sin) / norm, (cos * new_sin - sin * new_cos) / norm


@torch.inference_mode()
def rotations(decoder: SlotDecoder) -> list[Rotation | None]:
    """Return the rotation of each layer's keys; None for a layer whose keys do not depend on the position.

    If a single token is run alone at two positions, its keys differ only by the rotation, in every layer. So each
    possible rotation is tried on these keys.

    A model without a rotary module, but with an embedding of positions, has None in every layer: its keys cannot be
    re-rotated and stay unchanged. Later tokens still get positions within the cache.

    Args:
        decoder: the model.

    Raises:
        UnsupportedModelError: the keys depend on the position in an unknown way. Or the values depend on it, as in a
            compressed cache with rotated components.
    """
    model = decoder.model
    (before, values_before), (after, values_after) = (_kv_at(decoder, position) for position in _PROBED_POSITIONS)
    candidates = list(_candidates(model))
    if not candidates and _embeds_positions(model):
        return [None] * len(before)
    for layer, (old, new) in enumerate(zip(values_before, values_after, strict=True)):
        if not _explains(None, old, new):
            raise UnsupportedModelError(
                f"a cache policy cannot serve this {model.config.model_type} model: the values of its layer"
                f" {layer} depend on the position, so they cannot be re-rotated"
            )
    by_layer: list[Rotation | None] = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        fitting = [rotation for rotation in [None, *candidates] if _explains(rotation, old, new)]
        if not fitting:
            raise UnsupportedModelError(
                f"a cache policy cannot serve this {model.config.model_type} model: the keys of its layer {layer}"
                " depend on their position in a way that is not known, so they cannot be re-rotated"
            )
        by_layer.append(fitting[0])
    return by_layer


def _kv_at(
    decoder: SlotDecoder, position: int
) -> tuple[list[Float[Tensor, "heads 1 dim"]], list[Float[Tensor, "heads 1 width"]]]:
    """Return the keys and values of each layer for a single token at a position."""
    slots = decoder.new_slots(1)
    decoder.forward(slots, torch.tensor([decoder.vocab_size // 3]), positions=torch.tensor([position]))
    # Copies, since the next slots may use the same storage.
    return [keys.clone() for keys in slots.filled_keys()], [values.clone() for values in slots.filled_values()]


def _candidates(model: PreTrainedModel) -> Iterator[Rotation]:
    """Yield all rotations that are possible with the model's rotary modules."""
    types = sorted(set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()))
    for module in text_decoder(model).modules():
        buffers = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        if not buffers:
            continue
        # A module for several types of layers needs the type as an argument.
        kinds: list[tuple[str, ...]] = [(kind,) for kind in types if f"{kind}_inv_freq" in buffers]
        for arguments in kinds or [()]:
            either = (False, True)
            for adjacent, layout, last, backwards in product(either, _LAYOUTS, either, either):
                yield Rotation(module, arguments, adjacent, layout, last, backwards)


def _explains(rotation: Rotation | None, old: Tensor, new: Tensor) -> bool:
    """Return whether a rotation turns a tensor of the first probed position into that of the second.

    Args:
        rotation: the rotation to try; None for no rotation.
        old: keys or values at the first probed position.
        new: keys or values at the second probed position.
    """
    if rotation is not None:
        tables = [rotation.table(old, torch.tensor([position], device=old.device)) for position in _PROBED_POSITIONS]
        if 2 * tables[0][0].shape[-1] > old.shape[-1]:
            return False
        old = rotation.rerotate(old, *tables)
    error = (old.double() - new.double()).abs().max() / new.double().std()
    return error.item() <= _TOLERANCE[new.dtype]


def _embeds_positions(model: PreTrainedModel) -> bool:
    """Return whether a model has an embedding with one row for each position. Up to 8 further rows are allowed."""
    words = model.get_input_embeddings()
    modules = text_decoder(model).modules()
    tables = [module for module in modules if isinstance(module, nn.Embedding) and module is not words]
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit is not None and any(0 <= table.num_embeddings - limit <= 8 for table in tables)


class KeyRerotation:
    """The eviction of slots of one model, with re-rotation of the keys that stay.

    The rotation is computed in double precision, from the model's own angles. The keys stay in the model's type: in 16
    bits, each re-rotation rounds them once more.

    Args:
        rotations: rotation of each layer's keys; None for a layer without one.
    """

    def __init__(self, rotations: Sequence[Rotation | None]) -> None:
        self._rotations = rotations

    @torch.inference_mode()
    def evict(self, slots: Slots, kept: Int[Tensor, "... m"]) -> None:
        """Evict all slots except the given ones. Their tokens get the positions 0, 1, 2, ... in the cache.

        The position of each slot must be its number. This is also true afterwards.

        Args:
            slots: slots that hold committed tokens only.
            kept: slots that stay, ascending: one selection for all heads and layers [m], or one for each head
                [layers, heads, m].
        """
        length = slots.length
        slots.gather(kept)
        positions, selections = Copies(torch.arange(length, device=kept.device)), Copies(kept)
        count = kept.shape[-1]
        tables: dict[tuple[Rotation, torch.device], tuple[Tensor, Tensor]] = {}
        angles: dict[tuple[Rotation, torch.device], tuple[Tensor, Tensor]] = {}
        for layer, (keys, rotation) in enumerate(zip(slots.filled_keys(), self._rotations, strict=True)):
            if rotation is None:
                continue
            key = rotation, (device := keys.device)
            if key not in tables:
                tables[key] = rotation.table(keys, positions[device])
            if key not in angles or kept.dim() > 1:  # all layers share a selection, or each head has its own
                cos, sin = tables[key]
                old = selections[device] if kept.dim() == 1 else selections[device][layer]
                angles[key] = _between((cos[old], sin[old]), (cos[:count], sin[:count]))
            keys.copy_(rotation.rotate(keys, angles[key]))
