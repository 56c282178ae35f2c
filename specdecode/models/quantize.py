"""Quantisation: a transform of a loaded module to 8-bit weights, before it decodes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from specdecode.backends.packed import PackedLinear
from specdecode.core.errors import UnsupportedModelError


def quantizer(kind: str) -> Callable[[nn.Module], None]:
    """Return the transform that quantises a model's weights in place. Call it before loading the model.

    "int8" is torchao's weight-only INT8. A weight is an integer from -128 to 127 times the scale of its output channel,
    which is the largest magnitude there over 127.5; so the error is half a scale at most. A linear layer takes one byte
    per weight and five bytes per channel: a scale in float32, and a zero point that is always 0. All linear layers are
    quantised, including an untied output head. A head that is tied to the embedding stays as it is: its integers would
    be stored in addition to the embedding, of which a forward reads only some rows.

    Run eagerly, each forward first writes all integers of a layer out in the type of the activations, and then
    multiplies with those. That moves more bytes than an unquantised layer, so it may be slower, on a CPU and on a GPU:
    the gain is memory. Fewer bytes move only where a compiler fuses the conversion into the product. Eagerly torchao
    calls no kernel of its own for this, nor `torch._weight_int8pack_mm`.

    The transform raises UnsupportedModelError if any matrix other than an embedding belongs to no plain linear layer
    (GPT-2, Falcon, mixtures of experts): it would silently stay unquantised.

    Raises:
        ValueError: there is no such kind, or torchao is not installed.
    """
    if kind != "int8":
        raise ValueError(f"quantize is {kind!r}: weights are quantised to 'int8' only")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(f"INT8 weights need torchao ({error}): pip install torchao") from error
    # By default torchao changes the compiler's settings for the whole process.
    config = Int8WeightOnlyConfig(set_inductor_config=False)

    def transform(model: nn.Module) -> None:
        layers = _linear_layers(model)
        for layer in layers:
            # torchao takes no float64. Scales are float32 in any case, and the products stay in the activations' type.
            if layer.weight.dtype == torch.float64:
                layer.weight = nn.Parameter(layer.weight.float())
        quantize_(model, config, filter_fn=lambda module, name: module in layers)
        for layer in layers:
            if layer.weight.dtype == torch.float16:
                _scale_activations_by_128(layer.weight)

    return transform


def _scale_activations_by_128(weight: Any) -> None:
    """Divide activations by 128 and multiply scales by 128, so that products stay within float16.

    torchao multiplies activations by the integers first and by the scale last. Between the two, a real model exceeds
    65,504, the largest float16 (SmolLM2-135M by a factor of 8). Scaled like this, the integers act as weights of at
    most 1.
    """
    weight.act_pre_scale = torch.tensor(1 / 128, dtype=weight.dtype, device=weight.device)
    weight.scale.mul_(128)


def _linear_layers(model: nn.Module) -> set[nn.Linear]:
    """Return the layers to quantise. All matrices must belong to them, except embeddings and heads tied to one.

    Raises:
        UnsupportedModelError: another module has a matrix.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = set()
    for name, module in model.named_modules():
        matrices = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
        if all(id(weight) in embeddings for weight in matrices):
            continue
        # A subclass may use its weight in other ways, which integers do not support.
        if type(module) is not nn.Linear or is_traceable_wrapper_subclass(module.weight):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be quantised: {name} is a {type(module).__name__} of"
                f" {type(matrices[0]).__name__}, and INT8 is for plain linear layers in floating point"
            )
        layers.add(module)
    return layers


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights as they are stored, packed layouts included."""
    packed = sum(module.packed_bytes for module in model.modules() if isinstance(module, PackedLinear))
    return sum(map(stored_bytes, model.parameters())) + packed


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes.

    A quantised tensor's `nbytes` are those of the tensor that it stands for. Here its integers, scales and zero points
    are counted. Of a tensor that processes share, this process's part is.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(stored_bytes(part) for part in parts if isinstance(part, Tensor))
