"""CUDA graphs: the kernel launches of a forward are captured once, and then replayed by one launch."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

MOST_CAPTURING_RUNS = 3
"""The most runs for one measurement if they capture something. Drafts that follow the clock may need new shapes each
time."""


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all captures on a device. One stream is enough: libraries keep workspaces per stream."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Capture callables as CUDA graphs. The graphs share one memory pool, as they never run at the same time.

    Args:
        device: the GPU that the callables run on. It is the current GPU during a capture, which records nothing else.

    Attributes:
        count: number of graphs captured so far, for all models.
        seconds: total time of these captures.
        reserved: bytes that the allocator reserved on the device during these captures.
    """

    count: ClassVar[int] = 0
    seconds: ClassVar[float] = 0.0
    reserved: ClassVar[int] = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, action: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """Wrap a callable so that it replays on the current contents of the same tensors. It first runs twice."""
        with torch.cuda.device(self._device):
            return self._captured(action)

    def _captured(self, action: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        started = time.perf_counter()
        # A capture begins by freeing unused memory. It must not count as memory that the capture gives back.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        # Libraries set up at their first call on a stream, which must not be captured. So these runs use its stream.
        side_stream = _side_stream(torch.cuda.current_device())
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(2):
                action()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the current stream: a capture that fails leaves its own one current (torch 2.11).
        capture = torch.cuda.graph(graph, pool=self._pool, stream=side_stream)
        with torch.cuda.stream(torch.cuda.current_stream()), _no_collection(), capture:
            result = action()
        torch.cuda.synchronize()
        CudaGraphs.count += 1
        CudaGraphs.seconds += time.perf_counter() - started
        CudaGraphs.reserved += torch.cuda.memory_reserved() - before

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return result

        return replay


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within this context no garbage is collected: other graphs in it would be destroyed, which a capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def clock() -> float:
    """Return the seconds of the host clock, without those of all captures of CUDA graphs in this process so far."""
    return time.perf_counter() - CudaGraphs.seconds
