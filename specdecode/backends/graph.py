"""CUDA graphs: the launches of a forward, recorded once and then made by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor


class CudaGraphs:
    """Captures actions as CUDA graphs that share one pool of memory: they never run at the same time.

    Attributes:
        count: graphs captured so far, for all models.
        seconds: that this took.
        reserved: bytes that the allocator took from the device meanwhile.
    """

    count: ClassVar[int] = 0
    seconds: ClassVar[float] = 0.0
    reserved: ClassVar[int] = 0

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, action: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        started, before = time.perf_counter(), torch.cuda.memory_reserved()
        # What libraries set up at the first call must not be captured, and a capture needs a stream of its own.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                action()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = action()
        torch.cuda.synchronize()
        CudaGraphs.count += 1
        CudaGraphs.seconds += time.perf_counter() - started
        CudaGraphs.reserved += torch.cuda.memory_reserved() - before

        def again() -> tuple[Tensor, ...]:
            graph.replay()
            return result

        return again
