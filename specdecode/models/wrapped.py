"""Models that other libraries have wrapped: compiled by PyTorch, or dispatched or offloaded by accelerate."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the model inside `torch.compile(model)`, whose wrapper has another class and signature.

    The forwards of the returned model are not compiled. Use the backend "compile" for that.

    Raises:
        ValueError: the value is no model.
    """
    if not isinstance(model, nn.Module):
        way = f"specdecode.load({model!r})" if isinstance(model, str) else "a model of transformers"
        raise ValueError(f"the model is a {type(model).__name__}: give {way}")
    inside: Any = model._modules.get("_orig_mod", model)
    return inside  # type: ignore[no-any-return]


def execution_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's forwards. Between forwards, offloaded weights are on the device "meta"."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooked = (_execution_device(module) for module in model.modules())
    return torch.device(next((device for device in hooked if device is not None), "meta"))


def unloaded_reason(model: PreTrainedModel) -> str | None:
    """Return a message if some of a model's weights were never loaded; None if all are loaded."""
    name = next((name for name, weights in model.named_parameters() if weights.is_meta), None)
    if name is None or any(_execution_device(module) is not None for module in model.modules()):
        return None
    return f'its weights, such as {name}, are on the device "meta" and were never loaded'


def rebind(copied: nn.Module, module: nn.Module) -> None:
    """Bind the methods in a copied module's attributes to the copy. Otherwise a wrapped forward would run the original.

    Args:
        copied: the copy of the module.
        module: the original module.
    """
    for name, value in list(vars(copied).items()):
        # A compiled method belongs to its original module, so the method before compilation is bound.
        function = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(function, MethodType) and function.__self__ is module:
            setattr(copied, name, MethodType(function.__func__, copied))
        elif isinstance(function, functools.partial) and function.args[:1] == (module,):
            bound = functools.partial(function.func, copied, *function.args[1:], **function.keywords)
            setattr(copied, name, functools.update_wrapper(bound, function))


def _execution_device(module: nn.Module) -> Any:
    """Return the device on which accelerate's hook runs a module; None without such a hook."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return next((device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None), None)
