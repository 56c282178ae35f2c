"""Tensor parallelism: each weight is split among the processes that `torchrun` has started."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from specdecode.core.errors import UnsupportedModelError, first_line
from specdecode.models.devices import leave_out_cudnn
from specdecode.models.variants import layer_configs
from specdecode.support.torchrun import local_rank, processes


def split_count(tp: str | None, name: str, quantize: str | None, backend: str) -> int:
    """Return the number of processes among which a model is split. For several processes, make "cuda" this process's
    own GPU.

    Args:
        tp: as for `processes`.
        name: as for `load`.
        quantize: as for `load`.
        backend: as for `load`.

    Raises:
        ValueError: as `processes`, an argument is not possible with split weights, or this process has no GPU of its
            own.
    """
    count = processes(tp)
    if count == 1:
        return 1
    if name.startswith("layers:"):
        raise ValueError(f"{name!r} shares the weights of its target, split or not: leave out tp")
    if quantize:
        raise ValueError(f"quantize={quantize!r} is for weights that one process holds: leave out tp, or quantize")
    if backend not in ("auto", "eager"):
        raise ValueError(f"split weights run on the backend eager only, and {backend!r} is asked for: leave it out")
    if torch.cuda.is_available():
        if local_rank() >= (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"torchrun started process {local_rank() + 1} on a machine with {gpus} GPUs, and each process needs one"
                f" of its own: give --nproc-per-node {gpus}"
            )
        torch.cuda.set_device(local_rank())
        leave_out_cudnn(torch.device("cuda"))
    return count


def arguments(count: int, source: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that split a model among `count` processes, by the plan of its
    architecture.

    Args:
        count: the number of processes.
        source: folder or hub id of the model.

    Raises:
        ValueError: as `check_heads`; or this version of transformers cannot split weights.
    """
    if count == 1:
        return {}
    config = None
    with suppress(Exception):  # from_pretrained says why there is no configuration
        config = AutoConfig.from_pretrained(source)
    if config is not None:
        check_heads(config, count)
    return {"distributed_config": _config(count)}


def check_heads(config: PretrainedConfig, count: int) -> None:
    """Raise ValueError if the processes cannot have equal numbers of attention heads."""
    for layer in layer_configs(config.get_text_config(decoder=True)):
        queries = getattr(layer, "num_attention_heads", count)
        keys = getattr(layer, "num_key_value_heads", None) or queries
        if queries % count or keys % count:
            raise ValueError(
                f"{count} processes cannot share {queries} attention heads, and {keys} of keys, in equal parts: start"
                " as many processes as divide both numbers"
            )


def split(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a loaded model with each weight split among `count` processes.

    Raises:
        UnsupportedModelError: transformers has no plan for the architecture, or cannot apply it.
        ValueError: as `check_heads`; or this version of transformers cannot split weights.
    """
    if count == 1:
        return model
    check_heads(model.config, count)
    kind: Any = type(model)
    distributed = _config(count)
    try:
        config, _, mesh = kind.prepare_distribute_model(distributed)
        parts: PreTrainedModel = kind.maybe_distribute_model(model, config, mesh)
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{kind.__name__} cannot be split among {count} processes: {first_line(error)}"
        ) from error
    return parts


def _config(count: int) -> Any:
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return DistributedConfig(tp_size=count)
    except (ImportError, TypeError) as error:
        raise ValueError("this version of transformers cannot split weights: install 5.18 or later") from error
