"""The bandwidth of a device, and the roofline of a model on it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from specdecode.backends.device import synchronise
from specdecode.models.lm import LM
from specdecode.models.quantize import stored_bytes

# Large enough that the caches of most processors and the start of a kernel do not matter.
_READ_BYTES, _READ_BYTES_ON_GPU = 2**30, 2**33


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that the device reads from its memory: the best of twelve sums of a large tensor.

    Decoding a token reads all weights once and writes next to nothing. So this bounds the throughput of any backend. A
    copy would bound it less well, as it writes as much as it reads.
    """
    size = _READ_BYTES
    if device.type == "cuda":
        size = min(_READ_BYTES_ON_GPU, torch.cuda.mem_get_info(device)[0] // 4)
    # A sum of 32-bit numbers is fast enough everywhere to wait for the memory alone; one of bytes is not.
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(12):
        synchronise(device)
        started = time.perf_counter()
        source.sum()
        synchronise(device)
        best = max(best, source.nbytes / (time.perf_counter() - started))
    return best


def roofline_throughput(target: LM, cached: int = 0) -> float:
    """Return the tokens per second of autoregressive decoding if only memory reads took time.

    Each token reads the weights, and the keys and values of `cached` tokens.
    """
    return read_bandwidth(target.device) / token_bytes(target, cached)


def roofline_of(target: LM | None, prompts: Mapping[str, Sequence[int]]) -> float:
    """Return the roofline with a prompt of mean length in the cache, in tokens per second; 0 without a target."""
    return 0.0 if target is None else roofline_throughput(target, round(fmean(map(len, prompts.values()))))


def token_bytes(target: LM, cached: int = 0) -> int:
    """Return the bytes that a forward on the backend "eager" reads.

    These are all weights, and the keys and values of `cached` tokens. An embedding that is not also the output layer is
    left out, as a forward reads only one row of it.
    """
    model = target.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = {id(parameter): parameter for parameter in model.parameters()}
    if head is not None and embedding.weight is not getattr(head, "weight", None):
        read.pop(id(embedding.weight), None)
    slots = target.new_slots(1)
    target.forward(slots, torch.zeros(1, dtype=torch.long))
    return sum(map(stored_bytes, read.values())) + cached * slots.bytes_held
