"""Tensor parallelism: each weight is split among the processes that `torchrun` has started."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from specdecode.core.errors import UnsupportedModelError, first_line
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
        ValueError: as `processes`, or an argument is not possible with split weights.
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
        torch.cuda.set_device(local_rank())
    return count


def arguments(count: int) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that split a model among `count` processes, by the plan of its
    architecture."""
    return {"distributed_config": _config(count)} if count > 1 else {}


def split(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a loaded model with each weight split among `count` processes.

    Raises:
        UnsupportedModelError: transformers has no plan for the architecture, or cannot apply it.
    """
    if count == 1:
        return model
    kind: Any = type(model)
    try:
        config, _, mesh = kind.prepare_distribute_model(_config(count))
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
