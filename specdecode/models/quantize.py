"""Weights in 8 bits: a transform of a loaded module, before it decodes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from specdecode.core.errors import UnsupportedModelError


def quantizer(kind: str) -> Callable[[nn.Module], None]:
    """The transform that quantises a model's weights in place, found before the model is loaded.

    "int8" is torchao's weight-only INT8: a weight is an integer from -128 to 127 times the scale of its output channel,
    which is the largest magnitude there over 127.5; so it is off by half a scale at most. A linear layer takes one byte
    a weight, and five bytes a channel: a scale in float32, and a zero point that is always 0. All linear layers are
    quantised, an output head of its own among them. A head that is tied to the embedding stays with it as it is: as
    integers it would be stored a second time, beside the embedding, of which a forward reads no more than rows.

    Run eagerly, as everything here is, each forward first writes all integers of a layer out in the type of the
    activations, and then multiplies with those: more bytes move than in an unquantised layer, so it may well be slower,
    on a CPU as on a GPU. What is gained is memory. Fewer bytes move only where a compiler puts the conversion into the
    product; eagerly torchao calls no kernel of its own for this, nor `torch._weight_int8pack_mm`.

    The transform raises UnsupportedModelError if any other matrix than an embedding is no plain linear layer's (GPT-2,
    Falcon, mixtures of experts): it would stay as it is in silence.

    Raises:
        ValueError: there is no such kind, or torchao is not installed.
    """
    if kind != "int8":
        raise ValueError(f"quantize is {kind!r}: weights are quantised to 'int8' only")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(f"INT8 weights need torchao ({error}): pip install torchao") from error
    # Unless told otherwise torchao changes the compiler's settings for the whole process.
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
                _count_in_128ths(layer.weight)

    return transform


def _count_in_128ths(weight: Any) -> None:
    """Keep products within float16: torchao multiplies activations by the integers first and by the scale last, and in
    between a real model exceeds 65,504, the most that there is (SmolLM2-135M by a factor of 8). With activations taken
    by 128 smaller, and scales as much larger, it is as if the weights were at most 1."""
    weight.act_pre_scale = torch.tensor(1 / 128, dtype=weight.dtype, device=weight.device)
    weight.scale.mul_(128)


def _linear_layers(model: nn.Module) -> set[nn.Linear]:
    """The layers to quantise: every matrix of the model is theirs, but embeddings and what is tied to one."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = set()
    for name, module in model.named_modules():
        matrices = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
        if all(id(weight) in embeddings for weight in matrices):
            continue
        # A class of its own may use its weight in a way that integers do not know.
        if type(module) is not nn.Linear or is_traceable_wrapper_subclass(module.weight):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be quantised: {name} is a {type(module).__name__} of"
                f" {type(matrices[0]).__name__}, and INT8 is for plain linear layers in floating point"
            )
        found.add(module)
    return found


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes: of a quantised one those of its integers, scales and zero points, for its own
    `nbytes` are those of what it stands for."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, part)) for part in parts)
