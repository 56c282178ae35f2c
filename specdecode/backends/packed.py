"""Linear layers laid out for few rows on a CPU.

PyTorch's `F.linear` hands float32 weights to the matrix library as they lie in memory, and the library lays them out
anew in every call with more than a row or two: eight rows then cost twice what one does, which is what speculation was
to save. oneMKL's packed matrices are laid out once (`cblas_sgemm_pack`, `cblas_sgemm_compute`; TorchInductor's freezing
uses the same operators). One row is no cheaper than before, rather a little dearer: its time is that of reading the
weights, and plain ones are read as fast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Rows that the layout is made for. Any number is computed with it; this is in the middle of what is verified at once.
_ROWS = 16
# Rows at which the layout must gain this much over the plain layers to be worth its time and memory; and the bytes
# of weights with which that is tried, of each shape: more than caches near a core hold, since decoding reads all
# weights from memory.
_TRIED_ROWS, _WORTH, _TRIED = 8, 1.1, 2**26

# A model, a subset of its layers and a second model made of the same weights share what is packed.
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.library.custom_op(
    "specdecode::packed_linear",
    mutates_args=(),
    schema="(Tensor inputs, Tensor packed, Tensor weight, Tensor? bias) -> Tensor",
)
def _linear(inputs: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product for a compiler, to which oneMKL's own operator takes its number of rows for a constant."""
    output: Tensor = torch.ops.mkl._mkl_linear(inputs, packed, weight, bias, inputs.numel() // inputs.shape[-1])
    return output


@_linear.register_fake
def _(inputs: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


class PackedLinear(nn.Module):
    """A linear layer that holds its weight in oneMKL's layout alone.

    Args:
        linear: with float32 weights on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        if linear.weight not in _layouts:
            with torch.no_grad():
                reorder = torch.ops.mkl._mkl_reorder_linear_weight
                _layouts[linear.weight] = reorder(linear.weight.detach().contiguous(), _ROWS)
        self.packed: Tensor = _layouts[linear.weight]
        # Of the original weight the operator asks for the shape alone, as long as it is told that the layout is for the
        # number of rows that it is given.
        self._shape = torch.empty(()).expand(self.out_features, self.in_features)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the layout that a product reads: as many as of the weight. (The library reserves up to four times as
        many, but never touches the rest, so that no memory is taken for it.)"""
        return 4 * self.in_features * self.out_features

    def forward(self, inputs: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        rows = inputs.numel() // self.in_features
        output: Tensor
        if torch.compiler.is_compiling():
            output = _linear(inputs, self.packed, self._shape, self.bias)
        else:
            output = torch.ops.mkl._mkl_linear(inputs, self.packed, self._shape, self.bias, rows)
        return output


def why_not(model: nn.Module) -> str | None:
    """Why no layer of the model can be packed, if none can."""
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkl, "_mkl_linear"):
        return "this build of PyTorch has no oneMKL"
    if not any(map(_packable, model.modules())):
        return "it has no plain linear layers in float32 on a CPU"
    return None


def pack(model: nn.Module) -> tuple[int, int]:
    """Put packed layers in the place of all plain linear ones.

    A head that is tied to the embedding is packed too: the embedding stays beside it.

    Returns:
        The number of layers that were packed, and of those of its matrices that stay as they are, embeddings apart:
        of another type, or of a class of their own.
    """
    packed = left = 0
    # Weights are let go as soon as they are packed.
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
    """Whether eight rows take a tenth less time through packed layers: tried with some of each shape, in a moment. A
    head over the vocabulary gains another share than the layers below it, and may be a fifth of the model."""
    held: dict[tuple[int, int], int] = {}
    tried: dict[tuple[int, int], list[nn.Linear]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and _packable(module):
            shape = (module.in_features, module.out_features)
            if held.get(shape, 0) < _TRIED:
                tried.setdefault(shape, []).append(module)
            held[shape] = held.get(shape, 0) + module.weight.nbytes
    plain_s = packed_s = 0.0
    for shape, layers in tried.items():
        rows = torch.ones(_TRIED_ROWS, shape[0])
        plain, packed = _seconds(
            [partial(layer, rows) for layer in layers], [partial(PackedLinear(layer), rows) for layer in layers]
        )
        share = held[shape] / sum(layer.weight.nbytes for layer in layers)
        plain_s, packed_s = plain_s + share * plain, packed_s + share * packed
    worth_it = plain_s > _WORTH * packed_s
    if not worth_it:
        for layer in (layer for layers in tried.values() for layer in layers):
            _layouts.pop(layer.weight, None)
    return worth_it


@torch.inference_mode()
def _seconds(*ways: Sequence[Callable[[], object]]) -> list[float]:
    """Of each way all actions together, the least of a few: what else the machine does only ever adds. The ways take
    turns, so that a busy moment falls on all."""
    least = [math.inf] * len(ways)
    for _ in range(7):
        for way, actions in enumerate(ways):
            started = time.perf_counter()
            for action in actions:
                action()
            least[way] = min(least[way], time.perf_counter() - started)
    return least


def _packable(module: nn.Module) -> bool:
    # A class of its own may use its weight in a way that the operator does not know; a subclass of tensor too.
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
