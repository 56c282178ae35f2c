"""The devices of a model: one, or several for its layers. Then accelerate's hooks move each layer's inputs to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

DeviceMap = str | Mapping[str, int | str | torch.device]
"""The devices of a model's layers: "auto" for all GPUs, or the device of each module by its name."""

CUDNN_ATTENTION = "SPECDECODE_CUDNN_ATTENTION"
"""Environment variable: "1" leaves the attention of cuDNN on."""


def choose_device(device: torch.device | str | int | None) -> torch.device:
    """Return the given device, or the default device for None. Raise ValueError if it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here; try 'cpu'") from error
    return chosen


def leave_out_cudnn(device: torch.device) -> None:
    """Let PyTorch's attention use no kernels of cuDNN in this process, if the device is a GPU.

    On Hopper, PyTorch prefers them in 16 bit. cuDNN plans each new shape for up to a second, also in timed runs of arms
    with many shapes, such as transformers' generate. With `SPECDECODE_CUDNN_ATTENTION=1` it stays as it is, to measure
    what it would gain in captured forwards, which are planned once.
    """
    if device.type == "cuda" and os.environ.get(CUDNN_ATTENTION) != "1":
        torch.backends.cuda.enable_cudnn_sdp(False)


def input_device(
    device: torch.device | str | None, device_map: DeviceMap | None, name: str, tp: str | None, backend: str
) -> torch.device:
    """Return the device of a model's inputs, by the arguments of `load`.

    Raises:
        ValueError: a device cannot be used. Or the device map is unknown, or does not go with the other arguments.
    """
    if device_map is None:
        return choose_device(device)
    if not device_map or (isinstance(device_map, str) and device_map != "auto"):
        raise ValueError(
            f"device_map is {device_map!r}: 'auto' spreads the layers over all GPUs, and a dict gives the device of"
            " each module by its name"
        )
    if tp is not None:
        raise ValueError(f"tp={tp!r} splits each weight, and device_map spreads whole layers: leave out one of them")
    if device is not None:
        raise ValueError(f"device={str(device)!r} is for a model on one device: leave out device, or device_map")
    if name.startswith("layers:"):
        raise ValueError(f"{name!r} shares the weights of its target, wherever they are: leave out device_map")
    if backend not in ("auto", "eager"):
        raise ValueError(
            f"layers over several devices run on the backend eager only, and {backend!r} is asked for: leave it out"
        )
    if isinstance(device_map, str):
        return choose_device(None)
    if "" in device_map and len(device_map) > 1:
        raise ValueError("device_map names '', the whole model, beside its parts: give a device for each part")
    return torch.device(_main({name: choose_device(there) for name, there in device_map.items()}))


def _main(places: Mapping[str, Any]) -> Any:
    """Return the device of a map that takes the inputs: the first that is not a CPU, if there is one."""
    return next((there for there in places.values() if not str(there).startswith("cpu")), "cpu")


def place(model: PreTrainedModel, device: torch.device, device_map: DeviceMap | None) -> None:
    """Move a model to a device or, with a device map, its layers from the CPU to their devices. See `leave_out_cudnn`.

    Raises:
        ValueError: the map leaves out a weight, or the devices cannot hold the model.
    """
    leave_out_cudnn(device)
    if device_map is None:
        model.to(device)  # type: ignore[arg-type]
        return
    # Only here: a machine without it can still measure models on one device.
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        undivided = list(model._no_split_modules or ())
        memory = get_balanced_memory(model, no_split_module_classes=undivided)
        places = infer_auto_device_map(model, memory, no_split_module_classes=undivided)
        if "disk" in places.values():
            raise ValueError(
                "device_map is 'auto', and the devices here cannot hold the whole model: take a smaller one"
            )
    else:
        places = dict(device_map)
    # By default accelerate takes any of the devices for the inputs. On the first, the embedding finds them in place.
    dispatch_model(model, places, main_device=_main(places), skip_keys=model._skip_keys_device_placement)
