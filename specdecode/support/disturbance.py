"""Measure the share of the processors that other work uses during a timing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

try:
    import psutil
except ImportError:  # part of the extra "benchmark"; without psutil the share is unknown
    psutil = None

_CPU_STAT = Path("/sys/fs/cgroup/cpu.stat")
_IDLE = ("idle", "iowait")
_WITH_CHILDREN = 4  # first fields: user and system time of the process, and of its ended children
_COUNTED_TWICE = ("guest", "guest_nice")  # "user" and "nice" contain them


def watch(*others: int, device: torch.device | None = None) -> Callable[[], float | None]:
    """Begin to measure the processor time that other work uses.

    Other work is all time of all processors that was not idle and not used by these processes and their children:
    other programs, the kernel, and time that a hypervisor gave to other machines ("steal"). Time in which a container's
    quota stopped processes counts too. The duration of the processes' own work has no effect on the result. For a GPU,
    the time is counted in which heat or power held down its clocks.

    Args:
        others: ids of further processes that work for this process.
        device: a GPU that these processes use.

    Returns:
        A function that returns the share of the processors' time that other work used since this call, from 0 to 1; or
        the share of the GPU's time, if that is larger. It returns None where the system does not report these times.
    """
    before, throttled = _taken_s(others), _throttled_gpu_s(device)
    started = time.perf_counter()

    def share() -> float | None:
        passed = time.perf_counter() - started
        shares = [
            min(1.0, max(0.0, (after - since) / passed / parts))
            for after, since, parts in (
                (_taken_s(others), before, os.cpu_count() or 1),
                (_throttled_gpu_s(device), throttled, 1),
            )
            if after is not None and since is not None and passed > 0
        ]
        return max(shares, default=None)

    return share


def _throttled_gpu_s(device: torch.device | None) -> float | None:
    if device is None or device.type != "cuda":
        return None
    from specdecode.support.environment import throttled_s  # imports PyTorch, which other projects may lack

    return throttled_s(device)


def _taken_s(others: Collection[int]) -> float | None:
    """Return the processor seconds of other work since a fixed moment; None where they are unknown."""
    if psutil is None:
        return None
    with suppress(psutil.Error, OSError):
        everyone = psutil.cpu_times()._asdict()
        busy = sum(seconds for name, seconds in everyone.items() if name not in (*_IDLE, *_COUNTED_TWICE))
        processes = set(_family(psutil.Process()))
        for other in map(psutil.Process, others):
            if other not in processes:  # most are children of this process, and to list children takes milliseconds
                processes.update(_family(other))
        processes_s = sum(sum(process.cpu_times()[:_WITH_CHILDREN]) for process in processes)
        return float(busy - processes_s + _throttled_s())
    return None


def _family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all its living descendants."""
    return [process, *process.children(recursive=True)]


def _throttled_s() -> float:
    """Return the seconds for which a container's quota stopped its processes; 0 without a quota."""
    with suppress(OSError, ValueError, KeyError):
        counts = dict(line.split() for line in _CPU_STAT.read_text().splitlines())
        return int(counts["throttled_usec"]) * 1e-6
    return 0.0
