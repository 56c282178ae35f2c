"""Measure the bandwidth of a device, and the roofline of a model on it."""

from __future__ import annotations

import time

import torch

from specdecode.backends.device import synchronise
from specdecode.models.lm import LM
from specdecode.models.quantize import stored_bytes

_COPY_BYTES = 2**28


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a large copy reads and writes on the device: the best of a few copies.

    Decoding a token streams all weights once, so this bounds the throughput of any backend.
    """
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = max(best, 2 * _COPY_BYTES / (time.perf_counter() - started))
    return best


def roofline_throughput(target: LM) -> float:
    """Return the tokens per second of autoregressive decoding if nothing but streaming the weights took time."""
    return copy_bandwidth(target.device) / token_bytes(target)


def token_bytes(target: LM) -> int:
    """Return the bytes of all weights that a forward reads, of a target on the backend "eager".

    Left out are keys and values, which are few at the lengths measured here, and an embedding of which a forward reads
    one row.
    """
    model = target.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = {id(parameter): parameter for parameter in model.parameters()}
    if head is not None and embedding.weight is not head.weight:
        read.pop(id(embedding.weight), None)
    return sum(map(stored_bytes, read.values()))
