"""The counters run: an untimed run of an arm that warms it up, with counts that would slow down a timed run."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from specdecode.backends.compiled import preparations
from specdecode.backends.graph import MOST_CAPTURING_RUNS
from specdecode.bench.arms.arm import Arm
from specdecode.bench.runs.measures import CountersRun

# Only the shapes of a short text are captured. A longer text would not spare the repeats of `timed_by`, since a longer
# prompt needs shapes and slots of its own.
COUNTERS_RUN_TOKENS = 16
"""Length of the counters run of each arm."""

# Names of operations that wait until a tensor's content is on the host.
_READS = frozenset(
    {
        "tolist",
        "item",
        "numpy",
        "cpu",
        "nonzero",
        "equal",
        "allclose",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
    }
)
# Part of PyTorch's warning about a synchronisation.
_WAITS = "called a synchronizing CUDA operation"
# Beginning of PyTorch's warning, once a process, that these warnings are not complete.
_PROTOTYPE = "Synchronization debug mode is a prototype feature"


@contextmanager
def host_reads(device: torch.device) -> Iterator[list[int]]:
    """Append to the yielded list how often the host waited for the content of a tensor within the context.

    On a GPU, PyTorch warns of each synchronisation. Without a GPU, each read of any tensor counts, because it is not
    known which tensors would be on a GPU.
    """
    counted: list[int] = []
    if device.type != "cuda":
        with _HostReads() as reads:
            yield counted
        counted.append(reads.count)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counted
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counted.append(sum(_WAITS in str(warning.message) for warning in caught))
    for warning in caught:
        if not any(known in str(warning.message) for known in (_WAITS, _PROTOTYPE)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class _HostReads(TorchFunctionMode):
    """A mode that counts Python's reads of a tensor's content.

    Attributes:
        count: number of reads so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS or _selects_by_mask(func, args):
            self.count += bool(args) and isinstance(args[0], Tensor)
        return func(*args, **(kwargs or {}))


def _selects_by_mask(func: Any, args: Any) -> bool:
    """Return whether a call is `x[mask]`: its result's shape depends on the mask's content."""
    if getattr(func, "__name__", "") != "__getitem__":
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor) and part.dtype is torch.bool for part in index)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Append to the yielded list the allocator's peak within the context, in bytes above those held before."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield peak
    now = most = 0
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    peak.append(most)


@contextmanager
def no_stderr() -> Iterator[None]:
    """Silence the profiler: it writes to the file descriptor of standard error in every run."""
    sys.stderr.flush()
    stderr_copy = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr_copy, 2)
        os.close(stderr_copy)


def counters_run(arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> CountersRun:
    """Run the arm untimed, and return its counters. Those of peers, servers and arms from code are empty.

    A run that captures something runs again: its memory would depend on the arms before it.

    Host synchronisations are counted by `host_reads`, but not for compiled code without a GPU. Forwards over static
    shapes are counted by `LM.forwards`.
    """
    if arm.foreign:
        # The models, processes and kernels of a foreign arm cannot be observed. The run only warms it up.
        arm.run(prompt, length, expected)
        return CountersRun()
    assert arm.target is not None
    target, forwards = arm.target, 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    # A replayed forward calls no module, and a hook would cause a compiled forward to be compiled again.
    hook = target.model.register_forward_pre_hook(count) if target.static is None else None
    # A function mode would cause compiled code to be compiled again, and could not see the reads in it.
    uncounted = target.backend.name == "compile" and target.device.type != "cuda"
    try:
        for _ in range(MOST_CAPTURING_RUNS):
            prepared, forwards, forwards_before = preparations(), 0, target.forwards
            with peak_memory(target.device) as peak, nullcontext() if uncounted else host_reads(target.device) as reads:
                run = arm.run(prompt, length, expected)
            if preparations() == prepared:
                break
    finally:
        if hook is not None:
            hook.remove()
    if arm.peer:
        return CountersRun()
    return CountersRun(
        host_syncs_per_step=None if reads is None else reads[0] / run.counts.steps,
        forwards_per_step=(target.forwards - forwards_before if hook is None else forwards) / run.counts.steps,
        weight_bytes=float(target.weight_bytes),
        peak_bytes=float(peak[0]),
    )
