"""Quantisation: a transform of a loaded module to 8-bit or 4-bit weights, before any decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from specdecode.backends.merged import parts, same_inputs
from specdecode.backends.packed import PackedLinear
from specdecode.backends.row_attention import by_rows
from specdecode.core.errors import UnsupportedModelError
from specdecode.models.quantized_linear import GROUP, Int4Linear, Int8Linear

KINDS = ("int8", "int4")
"""Weights of 8 bits and of 4 bits."""

COARSE = "int4-coarse"
"""Weights of 4 bits with one grid for each output channel: a negative control of "int4"."""


def quantizer(kind: str, device: torch.device | None = None) -> Callable[[nn.Module], None]:
    """Return the transform that quantises a model's weights in place. Call it before loading the model.

    All linear layers are quantised, including an untied output head (`models.quantized_linear`). A head that is tied to
    the embedding stays unquantised: its integers would need memory in addition to the embedding, of which a forward
    reads only some rows.

    The transform raises UnsupportedModelError if a matrix that is no embedding belongs to no plain linear layer (GPT-2,
    Falcon, mixtures of experts), or if 4-bit groups do not fit it. Otherwise that matrix would silently stay
    unquantised. It also raises it for a model with layers on several devices.

    Args:
        kind: "int8" or "int4"; or "int4-coarse", a negative control.
        device: the device that will decode; None if it is a CPU.

    Raises:
        ValueError: the kind is unknown, or the device cannot multiply with it.
    """
    if kind not in (*KINDS, COARSE):
        raise ValueError(f"quantize is {kind!r}: choose from {', '.join(KINDS)}")
    if kind != "int8" and device is not None and device.type != "cpu":
        raise ValueError(f"quantize is {kind!r}, and only a CPU multiplies with 4-bit weights: use 'int8' on {device}")

    def quantised(*layers: nn.Linear) -> nn.Module:
        if kind == "int8":
            return Int8Linear(*layers)
        return Int4Linear(*layers, group=layers[0].in_features if kind == COARSE else GROUP)

    def transform(model: nn.Module) -> None:
        if len({weight.device for weight in model.parameters()}) > 1:
            # The new layers would lack the hooks that move inputs.
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be quantised: its layers are on several devices; let `load` quantise it"
                " before it spreads them"
            )
        layers = _linear_layers(model, 1 if kind == "int8" else GROUP)
        made: dict[nn.Module, nn.Module] = {}
        for parent, groups in same_inputs(model).items():
            for names in groups:
                group = [getattr(parent, name) for name in names]
                if all(layer in layers for layer in group):
                    made |= zip(group, parts(quantised(*group), group), strict=True)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child in layers:
                    if child not in made:
                        made[child] = quantised(child)
                    setattr(parent, name, made[child])
        if isinstance(model, PreTrainedModel) and (device is None or device.type == "cpu"):
            by_rows(model)

    return transform


def _linear_layers(model: nn.Module, group: int) -> set[nn.Linear]:
    """Return the layers to quantise. All matrices must belong to them, except embeddings and heads tied to an
    embedding.

    Args:
        model: the model.
        group: inputs that share a grid: the number of inputs must be a multiple.

    Raises:
        UnsupportedModelError: another module has a matrix, or a layer has another number of inputs.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = set()
    for name, module in model.named_modules():
        matrices = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
        if all(id(weight) in embeddings for weight in matrices):
            continue
        # A subclass may use its weight in a way that integers do not support.
        if type(module) is not nn.Linear or is_traceable_wrapper_subclass(module.weight):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be quantised: {name} is a {type(module).__name__} of"
                f" {type(matrices[0]).__name__}, and integers are for plain linear layers in floating point"
            )
        if module.in_features % group:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be quantised to 4 bits: {name} has {module.in_features} inputs, no"
                f" multiple of {group}; use 'int8'"
            )
        layers.add(module)
    return layers


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's stored weights, packed layouts included."""
    modules = [module for module in model.modules() if isinstance(module, PackedLinear)]
    packed = {_address(module.packed): module.packed_bytes for module in modules}
    return sum((packed | {_address(weight): stored_bytes(weight) for weight in model.parameters()}).values())


def _address(weight: Tensor) -> int:
    """Return the address of a weight, as layouts may leave a head in the embedding that it is tied to. A tensor in a
    library's layout, or of a subclass, has none: it gets the address of the object."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    return weight.data_ptr() if plain else id(weight)


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor occupies.

    For a quantised tensor these are the bytes of its integers, scales and zero points. (Its `nbytes` would be the bytes
    of the unquantised tensor.) Of a tensor that is split among processes, only the part of this process counts.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(stored_bytes(part) for part in parts if isinstance(part, Tensor))
