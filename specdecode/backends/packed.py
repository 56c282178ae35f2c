"""Packed linear layers: weights laid out for few rows on a CPU.

PyTorch's `F.linear` passes float32 weights to the matrix library as they lie in memory. In every call with more than a
row or two, the library then changes their layout again. So eight rows cost twice as much as one, which cancels the gain
of speculation. oneMKL's packed matrices are laid out once (`cblas_sgemm_pack`, `cblas_sgemm_compute`; TorchInductor's
freezing uses the same operators). One row becomes slightly slower: its time is the time to read the weights, and plain
weights are read as fast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from specdecode.support import trials

# Rows for which the layout is optimised: a draft of medium length. Any number of rows can use it.
_LAYOUT_ROWS = 16
# Over this many rows, packed layers must be faster by this factor to be worth the time and memory of packing.
_TRIAL_ROWS, _LEAST_SPEEDUP = 8, 1.1
# Bytes of weights of each shape in the trial. They exceed the caches near a core, because decoding reads all weights
# from memory.
_TRIAL_BYTES = 2**26

# Layouts by weight. A model, subsets of its layers and other models with the same weights share them.
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.library.custom_op(
    "specdecode::packed_linear",
    mutates_args=(),
    schema="(Tensor inputs, Tensor packed, Tensor weight, Tensor? bias) -> Tensor",
)
def _linear(inputs: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply, in a form for the compiler: for oneMKL's own operator the number of rows must be a constant."""
    output: Tensor = torch.ops.mkl._mkl_linear(inputs, packed, weight, bias, inputs.numel() // inputs.shape[-1])
    return output


@_linear.register_fake
def _(inputs: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


class PackedLinear(nn.Module):
    """A linear layer that holds its weight in oneMKL's layout only.

    Args:
        linear: the layer to pack, with float32 weights on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        if linear.weight not in _layouts:
            with torch.no_grad():
                reorder = torch.ops.mkl._mkl_reorder_linear_weight
                _layouts[linear.weight] = reorder(linear.weight.detach().contiguous(), _LAYOUT_ROWS)
        self.packed: Tensor = _layouts[linear.weight]
        # The operator reads only the shape of the original weight, if its last argument equals the rows of its input.
        self._shape = torch.empty(()).expand(self.out_features, self.in_features)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the layout that a product reads: the size of the weight. (The library reserves up to four times as
        many bytes, but never touches the rest, so they occupy no memory.)"""
        return 4 * self.in_features * self.out_features

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        rows = inputs.numel() // self.in_features
        output: Tensor
        if torch.compiler.is_compiling():
            output = _linear(inputs, self.packed, self._shape, self.bias)
        else:
            output = torch.ops.mkl._mkl_linear(inputs, self.packed, self._shape, self.bias, rows)
        return output


def unsupported_reason(model: nn.Module) -> str | None:
    """Return why no layer of the model can be packed; None if some can."""
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkl, "_mkl_linear"):
        return "this build of PyTorch has no oneMKL"
    if not any(map(_packable, model.modules())):
        return "it has no plain linear layers in float32 on a CPU"
    return None


def pack(model: nn.Module) -> tuple[int, int]:
    """Replace all plain linear layers by packed layers.

    An output head that is tied to the embedding is packed too; the embedding stays beside it.

    Returns:
        The number of packed layers, and the number of unchanged matrices: those of another type or class, without
        embeddings.
    """
    packed = left = 0
    # Each weight is released as soon as it is packed.
    for module in [module for module in model.modules() if not _packable(module)]:
        for name, child in list(module.named_children()):
            if _packable(child):
                assert isinstance(child, nn.Linear)
                setattr(module, name, PackedLinear(child))
                packed += 1
            elif not isinstance(child, nn.Embedding):
                left += any(weight.dim() > 1 for weight in child.parameters(recurse=False))
    return packed, left


def is_worth_it(model: nn.Module) -> bool:
    """Return whether packed layers are faster over eight rows by a tenth, by a short trial. The result for a model that
    is too large for the caches is kept for later processes (`support.trials`)."""
    bytes_of: dict[tuple[int, int], int] = {}
    tried: dict[tuple[int, int], list[nn.Linear]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and _packable(module):
            shape = (module.in_features, module.out_features)
            if bytes_of.get(shape, 0) < _TRIAL_BYTES:
                tried.setdefault(shape, []).append(module)
            bytes_of[shape] = bytes_of.get(shape, 0) + module.weight.nbytes
    if sum(bytes_of.values()) < _TRIAL_BYTES:
        return _gain(tried, bytes_of)
    shapes = ", ".join(f"{size / (4 * n * m):.0f} of {n} x {m}" for (n, m), size in sorted(bytes_of.items()))
    return trials.tried(f"packed linear layers, {shapes}", lambda: _gain(tried, bytes_of))


def _gain(tried: Mapping[tuple[int, int], Sequence[nn.Linear]], bytes_of: Mapping[tuple[int, int], int]) -> bool:
    """Time some layers of each shape, plain and packed: an output head may be a fifth of the model, and gains another
    share than the layers below it."""
    plain_s = packed_s = 0.0
    for shape, layers in tried.items():
        rows = torch.ones(_TRIAL_ROWS, shape[0])
        plain, packed = _seconds(
            [partial(layer, rows) for layer in layers], [partial(PackedLinear(layer), rows) for layer in layers]
        )
        factor = bytes_of[shape] / sum(layer.weight.nbytes for layer in layers)
        plain_s, packed_s = plain_s + factor * plain, packed_s + factor * packed
    worth_it = plain_s > _LEAST_SPEEDUP * packed_s
    if not worth_it:
        for layer in (layer for layers in tried.values() for layer in layers):
            _layouts.pop(layer.weight, None)
    return worth_it


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


def _packable(module: nn.Module) -> bool:
    # Subclasses of linear layers and of tensors may use the weight differently from the operator.
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
