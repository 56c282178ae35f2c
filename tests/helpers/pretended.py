"""A pretended CUDA device: faults that otherwise appear only on a GPU appear on a CPU.

Tensors say that they lie on cuda:0 or cuda:1, and the CPU computes them. As on GPUs,

* an operation over tensors of two devices is an error;
* reading a tensor makes the host wait, and so does a copy of host memory without `non_blocking`. Both are counted by
  the line of the package, with a warning while `torch.cuda.set_sync_debug_mode("warn")` is on;
* a copy to the host that nobody waits for holds garbage until something waits;
* a CUDA graph records operations, and replays them on the same storage. The capture itself computes nothing. A graph's
  results are overwritten by the next replay of another graph of its pool. Nothing may wait during a capture, and only
  the current device is captured.

`python -m pytest -p tests.helpers.pretended --device=cuda:0 ...` runs tests on it. It has no kernels of its own: only a
real GPU shows their rounding and their times. Nothing is compiled on it, and nothing trained.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.helpers.pretended_tensors import DEVICE, DEVICES, CudaTensor, Mode, Operation, aten, compute, tensors_in


class CUDAGraph:
    """A captured graph.

    Attributes:
        operations: the operations to replay; each is a kernel.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operations: list[Operation] = []
        self._created: list[torch.Tensor] = []
        self._pool = _Pool()

    def captured(self, operations: list[Operation], pool: _Pool) -> None:
        self.operations, self._pool = operations, pool
        for operation in operations:
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((operation.args, operation.kwargs))}
            for result in operation.results:
                if result.is_floating_point() and result.untyped_storage().data_ptr() not in given:
                    self._created.append(result)
        self.spoil()

    def spoil(self) -> None:
        """Fill the tensors that the graph created with garbage, except those that it was given to write to."""
        for result in self._created:
            result.fill_(float("nan"))

    def replay(self) -> None:
        DEVICE.replays += 1
        DEVICE.replayed = self.operations
        with _disable_current_modes(), torch.no_grad():
            if self._pool.last not in (None, self):
                self._pool.last.spoil()
            self._pool.last = self
            for operation in self.operations:
                operation.run()


class _Pool:
    """The memory that graphs share.

    Attributes:
        last: the graph that ran last; None if none has.
    """

    def __init__(self) -> None:
        self.last: Any = None


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, pool: _Pool | None = None, **_: Any) -> Iterator[None]:
    """Capture the operations of this context. After a failure the capture's own stream stays current, as in PyTorch."""
    DEVICE.deliver()
    DEVICE.recording = []
    _Stream.current = _Stream()
    try:
        yield
    finally:
        operations, DEVICE.recording = DEVICE.recording or [], None
    _Stream.current = _Stream.default
    DEVICE.captures += 1
    with _disable_current_modes(), torch.no_grad():
        cuda_graph.captured(operations, pool or _Pool())


class _Stream:
    """A stream. All of them run in order."""

    default: _Stream
    current: _Stream

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None:
        DEVICE.deliver()

    def query(self) -> bool:
        return True


_Stream.default = _Stream.current = _Stream()


@contextlib.contextmanager
def _stream(stream: _Stream) -> Iterator[None]:
    before, _Stream.current = _Stream.current, stream
    try:
        yield
    finally:
        _Stream.current = before


@contextlib.contextmanager
def _device(device: Any) -> Iterator[None]:
    """Make a device the current one within this context."""
    before, DEVICE.current = DEVICE.current, torch.device(device).index or 0
    try:
        yield
    finally:
        DEVICE.current = before


def _debug(mode: int | str) -> None:
    DEVICE.warns = mode in (1, "warn")


_attention = torch.nn.functional.scaled_dot_product_attention


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Run attention as one operation: otherwise PyTorch would choose one of its kernels for a GPU."""
    if not isinstance(query, CudaTensor):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    return compute(aten.scaled_dot_product_attention.default, arguments, {"scale": scale, "enable_gqa": enable_gqa})


def install() -> None:
    """Install the device in this process, until the process ends."""
    about = types.SimpleNamespace(
        uuid="0", name="Pretended", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132
    )
    for name, value in {
        "CUDAGraph": CUDAGraph,
        "Stream": _Stream,
        "_lazy_init": lambda: None,
        "current_device": lambda: DEVICE.current,
        "current_stream": lambda device=None: _Stream.current,
        "default_stream": lambda device=None: _Stream.default,
        "device": _device,
        "device_count": lambda: DEVICES,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: about.name,
        "get_device_properties": lambda device=None: about,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "graph": graph,
        "graph_pool_handle": _Pool,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: DEVICE.recording is not None,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (2**30, about.total_memory),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_rng_state": lambda state, device="cuda": None,
        "set_sync_debug_mode": _debug,
        "stream": _stream,
        "synchronize": lambda device=None: DEVICE.deliver(),
    }.items():
        setattr(torch.cuda, name, value)
    torch.nn.functional.scaled_dot_product_attention = _scaled_dot_product_attention
    # A dispatch mode sees one thread alone, and transformers would load weights in others.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    # torch.tensor(..., device="cuda") creates its content in host memory first. This makes the copy visible.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # In inference mode composite operations arrive undivided, and for gradients PyTorch asks for a build with
    # CUDA.
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[assignment, misc]
    torch.set_grad_enabled(False)
    Mode().__enter__()


def pytest_load_initial_conftests() -> None:
    """Install the device before the package is imported: the package's annotations name the replaced classes."""
    install()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the operations that the host waited for."""
    terminalreporter.section("pretended CUDA device")
    terminalreporter.write_line(f"{DEVICE.captures} captures, {DEVICE.replays} replays")
    for (reason, line), times in DEVICE.host_reads.most_common(40):
        terminalreporter.write_line(f"{times:8d} {reason} at {line}")
