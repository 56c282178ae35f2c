"""The operations in a target's forwards by their time: kernels on a GPU, PyTorch's operations on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from specdecode.backends.device import synchronise
from specdecode.bench.measure.counters import no_stderr
from specdecode.decoding.measure_costs import Verifier
from specdecode.models.lm import LM

PROFILED_ROWS = (1, 8)
"""Rows of the profiled forwards."""

_WARM_UPS, _FORWARDS = 3, 10


@dataclass(frozen=True, slots=True)
class Operation:
    """All calls of one operation in a forward.

    Attributes:
        name: name of the kernel on a GPU, of PyTorch's operation on a CPU.
        calls: number of calls.
        seconds: time of these calls, without that of the operations inside them.
    """

    name: str
    calls: float
    seconds: float


@torch.inference_mode()
def forward_operations(target: LM) -> dict[int, list[Operation]]:
    """Profile forwards of `PROFILED_ROWS` rows, after the same cached tokens as in `forward_seconds`.

    Returns:
        The operations of a forward by its rows, those that take the most time first. Numbers of rows that exceed the
        context are left out. The lists are empty if the profiler sees nothing of the device, as on a GPU without CUPTI.
    """
    on_gpu = target.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    if on_gpu:
        # As PyTorch's profiler does for its own CUDA graphs: beside graphs, a later profile of the process crashes if
        # the profiling library was taken down after the first one.
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    verifier = Verifier(target, PROFILED_ROWS[-1])
    operations: dict[int, list[Operation]] = {}
    for rows in filter(verifier.fits, PROFILED_ROWS):
        for _ in range(_WARM_UPS):
            verifier.verify(rows)
        synchronise(target.device)
        if activity not in supported_activities():
            operations[rows] = []
            continue
        with no_stderr(), profile(activities=[activity]) as recorded:
            for _ in range(_FORWARDS):
                verifier.verify(rows)
            synchronise(target.device)
        operations[rows] = _longest_first(recorded.key_averages(), on_gpu)
    return operations


def _longest_first(events: Iterable[Any], on_gpu: bool) -> list[Operation]:
    """Return the operations of a forward from the profiler's averages over `_FORWARDS` of them."""
    device = "CUDA" if on_gpu else "CPU"
    operations = [
        Operation(
            name=event.key,
            calls=event.count / _FORWARDS,
            seconds=1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / _FORWARDS,
        )
        for event in events
        if event.device_type.name == device
    ]
    return sorted(operations, key=lambda operation: operation.seconds, reverse=True)
