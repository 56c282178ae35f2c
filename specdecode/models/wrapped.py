"""Models as other libraries hand them over: compiled by PyTorch, dispatched or offloaded by accelerate."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the model inside of `torch.compile(model)`, which has neither its class nor its signature.

    Its forwards then run as they are: what compiles them here is the backend "compile".
    """
    inside: PreTrainedModel = model._modules.get("_orig_mod", model)
    return inside


def execution_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's forwards. Offloaded weights are on the device "meta" between them."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooked = (_execution_device(module) for module in model.modules())
    return torch.device(next((device for device in hooked if device is not None), "meta"))


def unloaded_reason(model: PreTrainedModel) -> str | None:
    """Return what is said of weights that nobody loads; None if there are none."""
    name = next((name for name, weights in model.named_parameters() if weights.is_meta), None)
    if name is None or any(_execution_device(module) is not None for module in model.modules()):
        return None
    return f'its weights, such as {name}, are on the device "meta" and were never loaded'


def rebind(copied: nn.Module, module: nn.Module) -> None:
    """Bind what a module's own attributes call to a copy of it: wrapped forwards run the module that was wrapped."""
    for name, value in list(vars(copied).items()):
        # A compiled method is compiled for the module that it was taken from.
        function = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(function, MethodType) and function.__self__ is module:
            setattr(copied, name, MethodType(function.__func__, copied))
        elif isinstance(function, functools.partial) and function.args[:1] == (module,):
            bound = functools.partial(function.func, copied, *function.args[1:], **function.keywords)
            setattr(copied, name, functools.update_wrapper(bound, function))


def _execution_device(module: nn.Module) -> Any:
    """The device on which accelerate runs a module, if it is hooked."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return next((device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None), None)
