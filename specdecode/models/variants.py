"""Variants of a model that share its parameters: copies of the modules, and subsets of the layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from specdecode.backends.grouped_attention import own_config
from specdecode.backends.layers import decoder_layers
from specdecode.models.wrapped import rebind


def shared_copy(module: Any) -> Any:
    """Return a copy of a module and its submodules that shares all parameters and buffers.

    A parameter that is later replaced in the copy stays in the original, and vice versa. The same holds for hooks.
    """
    copied = copy.copy(module)
    rebind(copied, module)
    for name in [name for name in vars(copied) if name == "_parameters" or name.endswith("_hooks")]:
        setattr(copied, name, vars(copied)[name].copy())
    copied._modules = {name: None if child is None else shared_copy(child) for name, child in module._modules.items()}
    return copied


def layer_configs(config: PretrainedConfig) -> Sequence[PretrainedConfig]:
    """Return the configuration of each decoder layer, or only the given one if it holds for all.

    Of layers that differ in size, as those of Gemma 4 do, transformers gives no size that they would have in common.
    """
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """Return a model's norm before its output layer: the last norm beside the list of layers; None if there is none."""
    stack = decoder_layers(model)
    beside = next(
        ([*parent.children()] for parent in model.modules() if any(x is stack for x in parent.children())), []
    )
    norms = [module for module in beside if "norm" in type(module).__name__.lower()]
    return norms[-1] if norms else None


def layer_subset(model: PreTrainedModel, layers: Sequence[int], name: str) -> PreTrainedModel:
    """Return a model with some of the layers, which shares all parameters.

    Args:
        model: the original model, which is not changed.
        layers: indices of the layers that stay, ascending.
        name: name of the model, for messages.

    Raises:
        ValueError: `layers` is empty, out of range or out of order, or the model does not hold its layers in one list.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < total:
        raise ValueError(f"layers is {list(layers)}: it must be ascending indices from 0 to {total - 1}")
    subset: PreTrainedModel = shared_copy(model)
    subset.generation_config = copy.deepcopy(model.generation_config)
    stack = decoder_layers(subset)
    if stack is None:
        raise ValueError(f"{name} has no list of {total} layers to take some from: draft with another model")
    stack._modules = {str(i): stack[layer] for i, layer in enumerate(layers)}
    for i, layer in enumerate(stack):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = i  # type: ignore[assignment]
    config = own_config(subset).get_text_config(decoder=True)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    config.num_hidden_layers = len(layers)
    return subset
