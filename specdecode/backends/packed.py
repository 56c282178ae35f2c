"""Packed linear layers: weights laid out once, for few rows on a CPU (see `backends.layouts`).

One row may become slightly slower: its time is the time to read the weights, and plain weights are read as fast.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from specdecode.backends.layouts import LAYOUTS, PLAIN, Layout, exact_layouts, packed_layouts
from specdecode.backends.merged import SameInputs, joined_bias, joined_weight, parts
from specdecode.support import cached_trials

# Over this many rows, packed layers must be faster by this factor to be worth the time and memory of packing.
_TRIAL_ROWS, _LEAST_SPEEDUP = 8, 1.1
# Bytes of weights of each shape in the trial. They exceed the caches near a core, because decoding reads all weights
# from memory.
_TRIAL_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class _LaidOut:
    """Weights that were laid out.

    Attributes:
        layout: their layout, or one with the same way to lay them out.
        packed: the result.
        others: the weights that were laid out behind the first one.
    """

    layout: Layout
    packed: Tensor
    others: Sequence[weakref.ref[Tensor]]


# Weights that were laid out, by the first weight. A model, subsets of its layers and other models with the same weights
# share them.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.library.custom_op(
    "specdecode::packed_linear",
    mutates_args=(),
    schema="(Tensor inputs, Tensor packed, Tensor shape, Tensor? bias, str layout) -> Tensor",
)
def _linear(inputs: Tensor, packed: Tensor, shape: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    """Multiply, in a form for the compiler: for oneMKL's own operator the number of rows must be a constant."""
    return LAYOUTS[layout].multiply(inputs, packed, shape, bias)


@_linear.register_fake
def _(inputs: Tensor, packed: Tensor, shape: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], shape.shape[0]))


class PackedLinear(nn.Module):
    """A linear layer that holds its weight in one layout only; or several with the same inputs, as one layer.

    Attributes:
        layout: the layout.

    Args:
        layers: the layers to pack, on a CPU. All have a bias, or none has. The outputs of the first come first.
        layout: a layout for their type.
    """

    def __init__(self, layers: Sequence[nn.Linear], layout: Layout) -> None:
        super().__init__()
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.bias = joined_bias(layers)
        self.layout = layout
        self.packed = _laid_out(layers, layout)
        self._shape = layers[0].weight.new_empty(()).expand(self.out_features, self.in_features)

    @property
    def packed_bytes(self) -> int:
        """Bytes that a product reads. (A library may reserve up to four times as many bytes, but never touches the
        rest, so they occupy no memory.)"""
        return (self.layout.bytes_per_weight or self._shape.itemsize) * self.in_features * self.out_features

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        output: Tensor
        if torch.compiler.is_compiling():
            output = _linear(inputs, self.packed, self._shape, self.bias, self.layout.name)
        else:
            output = self.layout.multiply(inputs, self.packed, self._shape, self.bias)
        return output


def _laid_out(layers: Sequence[nn.Linear], layout: Layout) -> Tensor:
    """Return the weights of layers, laid out together now or before."""
    held: list[_LaidOut] = _packed.setdefault(layers[0].weight, [])
    others = [layer.weight for layer in layers[1:]]
    for laid_out in held:
        known = [weight() for weight in laid_out.others]
        # An entry for plain weights records that they are fastest. It says nothing of plain weights in blocks.
        alike = laid_out.layout == layout or laid_out.layout.pack is layout.pack is not PLAIN.pack
        if alike and len(known) == len(others) and all(map(is_, known, others)):
            return laid_out.packed
    packed = layout.pack(joined_weight(layers))
    held.append(_LaidOut(layout, packed, [weakref.ref(other) for other in others]))
    return packed


def unsupported_reason(model: nn.Module) -> str | None:
    """Return why no layer of the model can be packed; None if some can."""
    if not _layers(model):
        return "it has no plain linear layers on a CPU"
    if not layouts(model):
        return f"no library has a layout for {_name(_layers(model)[0].weight.dtype)} on this processor"
    return None


def layouts(model: nn.Module) -> list[Layout]:
    """Return the layouts of a library for the model's linear layers on this processor."""
    return packed_layouts(_layers(model)[0].weight.dtype)


def exact(model: nn.Module, same_inputs: SameInputs) -> list[Layout]:
    """Return the layouts with which a row of the model's linear layers has the same result beside any other rows.

    Args:
        model: the model.
        same_inputs: the groups of layers to merge.
    """
    layers = _layers(model)
    if not layers:
        return [PLAIN]
    merged = [[getattr(module, name) for name in names] for module, groups in same_inputs.items() for names in groups]
    shapes = {
        (sum(layer.out_features for layer in group), group[0].in_features)
        for group in [*merged, *([layer] for layer in layers)]
    }
    return exact_layouts(shapes, layers[0].weight.dtype)


def pack(model: nn.Module, layout: Layout, same_inputs: SameInputs = MappingProxyType({})) -> tuple[int, int]:
    """Replace all plain linear layers of the model's type by packed layers.

    An output head that is tied to the embedding is packed too; the embedding stays beside it.

    Args:
        model: the model, or another module.
        layout: a layout for its type.
        same_inputs: the groups of layers to merge (see `backends.merged`).

    Returns:
        The number of packed layers, and the number of unchanged matrices: those of another type or class, without
        embeddings.
    """
    dtype = next((layer.weight.dtype for layer in _layers(model)), None)
    packed = left = 0
    # Each weight is released as soon as it is packed, so no list of the layers is held.
    for module in [module for module in model.modules() if not _is_plain(module, dtype)]:
        for names in same_inputs.get(module, ()):
            layers = [getattr(module, name) for name in names]
            if all(_is_plain(layer, dtype) for layer in layers):
                for name, part in zip(names, parts(PackedLinear(layers, layout), layers), strict=True):
                    setattr(module, name, part)
                packed += len(names)
            del layers
        for name, child in list(module.named_children()):
            if _is_plain(child, dtype):
                assert isinstance(child, nn.Linear)
                setattr(module, name, PackedLinear([child], layout))
                packed += 1
            elif not isinstance(child, nn.Embedding):
                left += any(weight.dim() > 1 for weight in child.parameters(recurse=False))
    return packed, left


def fastest(model: nn.Module, candidates: Sequence[Layout]) -> Layout:
    """Return the layout with which the model's linear layers are fastest over eight rows, by a short trial.

    Packing takes time and memory, so weights stay as they are unless another layout is faster by a tenth. The result
    is kept for later processes (`support.cached_trials`). Weights that are laid out already are not tried again. A
    model that fits the caches is not tried at all and takes the first layout: its forwards spend their time elsewhere,
    and chance would decide.
    """
    layers = _layers(model)
    laid_out = [one.layout for layer in layers for one in _packed.get(layer.weight, ())]
    # Plain weights cost no packing, so only an entry of the same layout shows that a trial chose them.
    packs = {layout.pack for layout in laid_out} - {PLAIN.pack}
    if known := [layout for layout in candidates if layout in laid_out or layout.pack in packs]:
        return known[0]
    bytes_of: dict[tuple[int, int], int] = {}
    tried: dict[tuple[int, int], list[nn.Linear]] = {}
    for layer in layers:
        shape = (layer.in_features, layer.out_features)
        if bytes_of.get(shape, 0) < _TRIAL_BYTES:
            tried.setdefault(shape, []).append(layer)
        bytes_of[shape] = bytes_of.get(shape, 0) + layer.weight.nbytes
    if len(candidates) == 1 or sum(bytes_of.values()) < _TRIAL_BYTES:
        return candidates[0]
    size = layers[0].weight.itemsize
    shapes = ", ".join(f"{nbytes / (size * n * m):.0f} of {n} x {m}" for (n, m), nbytes in sorted(bytes_of.items()))
    what = f"fastest of {', '.join(layout.name for layout in candidates)} for {_name(layers[0].weight.dtype)}, {shapes}"
    by_name = {layout.name: layout for layout in candidates}
    return by_name[cached_trials.tried(what, list(by_name), lambda: _fastest(tried, bytes_of, candidates).name)]


def _fastest(
    tried: Mapping[tuple[int, int], Sequence[nn.Linear]],
    bytes_of: Mapping[tuple[int, int], int],
    candidates: Sequence[Layout],
) -> Layout:
    """Time some layers of each shape in each layout: an output head may be a fifth of the model, and gains another
    share than the layers below it."""
    total_s = dict.fromkeys(candidates, 0.0)
    for shape, layers in tried.items():
        rows = layers[0].weight.new_ones(_TRIAL_ROWS, shape[0])
        factor = bytes_of[shape] / sum(layer.weight.nbytes for layer in layers)
        ways = [[partial(PackedLinear([layer], layout), rows) for layer in layers] for layout in candidates]
        for layout, seconds in zip(candidates, _seconds(*ways), strict=True):
            total_s[layout] += factor * seconds
    if PLAIN in total_s:
        total_s[PLAIN] /= _LEAST_SPEEDUP
    best = min(candidates, key=lambda layout: total_s[layout])
    for layer in (layer for layers in tried.values() for layer in layers):
        # Keep the result if plain weights are best, as they are no copies: then a draft of them is not tried again.
        _packed[layer.weight] = [one for one in _packed[layer.weight] if one.layout == best == PLAIN]
    return best


@torch.inference_mode()
def _seconds(*ways: Sequence[Callable[[], object]]) -> list[float]:
    """Return the least of several total times for each list of actions: other work on the machine only adds time. The
    lists take turns, so that a busy moment slows all of them."""
    least = [math.inf] * len(ways)
    for _ in range(7):
        for way, actions in enumerate(ways):
            started = time.perf_counter()
            for action in actions:
                action()
            least[way] = min(least[way], time.perf_counter() - started)
    return least


def _layers(model: nn.Module) -> list[nn.Linear]:
    """Return the plain linear layers on a CPU whose weights have the type of the first of them."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain(module)]
    return [layer for layer in layers if layer.weight.dtype == layers[0].weight.dtype]


def _is_plain(module: nn.Module, dtype: torch.dtype | None = None) -> bool:
    # Subclasses of linear layers and of tensors may use the weight differently from a layout's product.
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and dtype in (None, weight.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
