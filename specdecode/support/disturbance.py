"""Tell how much of the processors other work takes while something is timed."""

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
except ImportError:  # comes with the extra "benchmark"; without it nothing is known
    psutil = None

_CPU_STAT = Path("/sys/fs/cgroup/cpu.stat")
_IDLE = ("idle", "iowait")
_WITH_CHILDREN = 4  # a process's own times and those of children that have ended, user and system
_COUNTED_TWICE = ("guest", "guest_nice")  # they are in "user" and "nice" too


def watch(*others: int, device: torch.device | None = None) -> Callable[[], float | None]:
    """Begin to watch what other work takes from this process and from some others.

    That is the time of all processors that neither these processes and their children used nor was idle: other
    programs, the kernel, and what a hypervisor gave to other machines ("steal"). Time in which a container's quota
    stopped processes counts too. How long the processes' own work takes does not change it. Of a GPU it is the time for
    which heat or power held down its clocks.

    Args:
        others: ids of processes that work for this one.
        device: a GPU that they use.

    Returns:
        A function that returns the share of the processors' time that was taken since then, from 0 to 1; or the share
        of the GPU's time, if that is more. It returns None where the system does not tell.
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
    from specdecode.support.environment import throttled_s  # imports PyTorch, which other projects do without

    return throttled_s(device)


def _taken_s(others: Collection[int]) -> float | None:
    """Return the processor seconds that were not the processes', from some moment on."""
    if psutil is None:
        return None
    with suppress(psutil.Error, OSError):
        everyone = psutil.cpu_times()._asdict()
        busy = sum(seconds for name, seconds in everyone.items() if name not in (*_IDLE, *_COUNTED_TWICE))
        processes = {one for pid in (os.getpid(), *others) for one in _family(psutil.Process(pid))}
        own = [process.cpu_times() for process in processes]
        return float(busy - sum(sum(times[:_WITH_CHILDREN]) for times in own) + _throttled_s())
    return None


def _family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that it has started, and these in turn, as far as they live."""
    return [process, *process.children(recursive=True)]


def _throttled_s() -> float:
    """Return the seconds for which a container's quota stopped its processes; 0 without one."""
    with suppress(OSError, ValueError, KeyError):
        counts = dict(line.split() for line in _CPU_STAT.read_text().splitlines())
        return int(counts["throttled_usec"]) * 1e-6
    return 0.0
