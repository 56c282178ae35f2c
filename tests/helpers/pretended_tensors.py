"""The tensors of the pretended device, their operations, and the counters: see `pretended`."""

from __future__ import annotations

import operator
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
DEVICES = 2
"""Number of devices: cuda:0 and cuda:1."""

# Operations that return a result to the host, or whose shapes depend on content.
_READS = {
    aten._local_scalar_dense.default,
    aten.allclose.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
_INDEXED = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# All other operations also accept a number in host memory.
_TAKES_NO_NUMBER = {
    "addmm",
    "bmm",
    "cat",
    "embedding",
    "gather",
    "index_add_",
    "index_copy",
    "index_copy_",
    "index_select",
    "linear",
    "mm",
    "scatter",
    "scatter_",
    "searchsorted",
    "stack",
}
_GARBAGE = 77


class CudaError(RuntimeError):
    """An error that CUDA or PyTorch would raise."""


@dataclass
class Device:
    """The events on all devices so far.

    Attributes:
        launches: kernels that the host launched, by line of the package; without those of a replayed graph.
        host_reads: waits of the host, by reason and line.
        captures, replays: counts of graphs.
        replayed: the operations of the graph that ran last.
        current: number of the current device, on which "cuda" is and graphs are captured.
        recording: the operations of the graph that is being captured; None if none is.
        late: copies to the host that have not arrived: the destination and the value.
        warns: warn on each wait, as `torch.cuda.set_sync_debug_mode` asks.
    """

    launches: Counter[str] = field(default_factory=Counter)
    host_reads: Counter[tuple[str, str]] = field(default_factory=Counter)
    captures: int = 0
    replays: int = 0
    replayed: list[Operation] = field(default_factory=list)
    current: int = 0
    recording: list[Operation] | None = None
    late: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    warns: bool = False

    def wait(self, reason: str) -> None:
        """Let the host wait for the queued work: late copies arrive."""
        _refuse_in_capture(reason)
        self.host_reads[reason, _line()] += 1
        if self.warns:
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)
        self.deliver()

    def deliver(self) -> None:
        """Complete the late copies."""
        _refuse_in_capture("synchronise")
        with _disable_current_modes():
            for host, value in self.late:
                host.copy_(value)
        self.late.clear()


DEVICE = Device()

host_alone = _disable_current_modes
"""A context for computations on the CPU alone: the device does not look at their operations, which is faster."""


def _line() -> str:
    """Return the innermost line of the package that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition("/specdecode/")
        if found and "site-packages" not in frame.f_code.co_filename:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "no line of the package"


class CudaTensor(torch.Tensor):
    """A tensor that says it lies on a device.

    Args:
        content: the values, on the CPU.
        device: the device.
    """

    content: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, content: torch.Tensor, device: torch.device) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            content.size(),
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            layout=content.layout,
            device=device,
            requires_grad=False,
        )
        made.content = content
        return made

    def tolist(self) -> Any:
        DEVICE.wait("tolist")
        return self.content.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    # PyTorch's own methods of these names need a build with CUDA.

    def item(self) -> Any:
        return aten._local_scalar_dense.default(self)

    def nonzero(self) -> torch.Tensor:
        return aten.nonzero.default(self)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return operator.index(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __invert__(self) -> torch.Tensor:
        return self.bitwise_not()

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return aten.copy_.default(self, source, non_blocking)

    def contiguous(self, memory_format: Any = torch.contiguous_format) -> torch.Tensor:
        return self if self.is_contiguous() else self.clone(memory_format=memory_format)

    def __getitem__(self, index: Any) -> torch.Tensor:
        view, tensors = _indexed(self, index)
        return aten.index.Tensor(view, tensors) if any(part is not None for part in tensors) else view

    def __setitem__(self, index: Any, value: Any) -> None:
        view, tensors = _indexed(self, index)
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=self.dtype)
        if any(part is not None for part in tensors):
            aten.index_put_.default(view, tensors, value)
        elif value.dim() == 0 and view.dim() and not isinstance(value, CudaTensor):
            view.fill_(value.item())
        else:
            view.copy_(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = CudaTensor(self.content.clone(), self.device)
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.content!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """A dispatch mode for operations that create a tensor on the device from nothing or from host memory."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it would take time in each operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def _cuda(device: Any) -> torch.device | None:
    """Return the CUDA device of an argument; None for another device, or none."""
    if device is None or torch.device(device).type != "cuda":
        return None
    index = torch.device(device).index
    return torch.device("cuda", DEVICE.current if index is None else index)


def _content(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.content if isinstance(tensor, CudaTensor) else tensor


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors among arguments, or among results."""
    found: list[torch.Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    # This runs for each operation, and most parts are numbers: so no call is spent on them.
    if isinstance(value, torch.Tensor):
        found.append(value)
        return
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list, dict)):
            _collect(part, found)


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Replace the tensors among arguments, or among results."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(function, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [
            _mapped(function, part) if isinstance(part, (torch.Tensor, tuple, list, dict)) else part for part in value
        ]
        return parts if type(value) is list else tuple(parts) if type(value) is tuple else type(value)(parts)
    return value


def _dimensions(part: Any) -> int:
    """Return how many dimensions a part of an index consumes."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1


def _indexed(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the view by numbers and slices, and the remaining index tensors by dimension."""
    parts = [
        torch.as_tensor(part) if isinstance(part, (list, range)) else part
        for part in (index if isinstance(index, tuple) else (index,))
    ]
    tensors: list[torch.Tensor | None] = []
    dim, left = 0, sum(map(_dimensions, parts))
    for part in parts:
        taken = _dimensions(part)
        if part is Ellipsis:
            tensors += [None] * (tensor.dim() - dim - left)
            dim = tensor.dim() - left
        elif part is None:
            tensor = tensor.unsqueeze(dim)
            tensors.append(None)
            dim += 1
        elif isinstance(part, slice):
            ends = (end if end is None else operator.index(end) for end in (part.start, part.stop, part.step or 1))
            tensor = aten.slice.Tensor(tensor, dim, *ends)
            tensors.append(None)
            dim += 1
        elif isinstance(part, torch.Tensor) and part.dim():
            tensors.append(part)
            dim += taken
        else:
            tensor = tensor.select(dim, operator.index(part))
        left -= taken
    return tensor, tensors


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = tensors_in((args, kwargs))
    ours = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    created_on = _cuda(kwargs.get("device"))
    if not ours and created_on is None:
        return func(*args, **kwargs)
    if func is aten._has_compatible_shallow_copy_type.default:
        return isinstance(args[0], CudaTensor) == isinstance(args[1], CudaTensor)
    if func is aten._to_copy.default:
        return _copied(args[0], dict(kwargs))
    if func is aten.copy_.default and args[0].device != args[1].device:
        return _copy_between(*args, **kwargs)
    if func in _READS:
        DEVICE.wait(func.__name__)
    device = created_on or ours[0].device
    _check(func, args, tensors, ours, device)

    plain = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    if "device" in kwargs:
        plain["device"] = torch.device("cpu")
    given = _mapped(_content, (args, plain))
    result = func(*given[0], **given[1])
    _launched(func, *given, result)
    if kwargs.get("device") is not None and created_on is None:
        return result
    known = {id(tensor.content): tensor for tensor in ours}  # an operation in place returns one of these
    return _mapped(lambda made: known[id(made)] if id(made) in known else CudaTensor(made, device), result)


def _copied(source: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Copy to another device or dtype."""
    device, waits = options.pop("device", None), not options.pop("non_blocking", False)
    options.pop("pin_memory", None)
    to = _cuda(source.device if device is None else device)
    func = aten._to_copy.default
    if isinstance(source, CudaTensor) and to is not None:
        if to != source.device:
            _refuse_in_capture("a copy to another device")
        result = func(source.content, **options)
        _launched(func, (source.content,), options, result)
        return CudaTensor(result, to)
    if to is not None:
        _copy_to_device(waits)
        return CudaTensor(func(source, **options).clone(), to)
    value = func(_content(source), **options).clone()
    if waits:
        DEVICE.wait("copy to the host")
        return value
    garbage = torch.full_like(value, True if value.dtype == torch.bool else _GARBAGE)
    DEVICE.late.append((garbage, value))
    return garbage


def _copy_between(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy into a tensor of another device. The host does not wait for a copy between two GPUs."""
    if isinstance(to, CudaTensor):
        if isinstance(source, CudaTensor):
            _refuse_in_capture("a copy from another device")
            DEVICE.launches[_line()] += 1
        else:
            _copy_to_device(not non_blocking)
        to.content.copy_(_content(source))
        return to
    DEVICE.wait("copy to the host")
    return to.copy_(_content(source))


def _refuse_in_capture(what: str) -> None:
    if DEVICE.recording is not None:
        raise CudaError(f"operation not permitted when stream is capturing: {what} at {_line()}")


def _copy_to_device(waits: bool) -> None:
    _refuse_in_capture("a copy of host memory")
    if waits:
        DEVICE.wait("blocking copy to the device")
    DEVICE.launches[_line()] += 1


def _check(func: Any, args: Any, tensors: list[torch.Tensor], ours: list[CudaTensor], device: torch.device) -> None:
    """Raise CudaError where an operation mixes devices wrongly. Count an index that makes the host wait."""
    name = func.__name__.split(".")[0]
    for tensor in ours:
        if tensor.device != ours[0].device:
            raise CudaError(
                f"Expected all tensors to be on the same device, but found {ours[0].device} and {tensor.device}:"
                f" {name} at {_line()}"
            )
    if DEVICE.recording is not None and device.index != DEVICE.current:
        raise CudaError(f"{name} runs on {device} while cuda:{DEVICE.current} captures: at {_line()}")
    if func in _INDEXED:
        indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            DEVICE.wait("index by a mask")
        on_host = [index for index in indices if not isinstance(index, CudaTensor)]
        if isinstance(args[0], CudaTensor):
            if on_host:
                DEVICE.wait("index in host memory")
        elif len(on_host) < len(indices):
            raise CudaError(f"indices should be on the device of the indexed tensor (cpu): {name} at {_line()}")
        if len(args) > 2 and isinstance(args[0], CudaTensor) != isinstance(args[2], CudaTensor) and args[2].dim():
            raise CudaError(f"Expected all tensors to be on the same device: {name} at {_line()}")
        return
    on_host = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if ours and on_host and (name in _TAKES_NO_NUMBER or any(tensor.dim() for tensor in on_host)):
        raise CudaError(
            f"Expected all tensors to be on the same device, but found {device} and cpu: {name} at {_line()}"
        )


@dataclass(frozen=True)
class Operation:
    """An operation that a graph replays.

    Attributes:
        func: the function; its arguments hold contents in place of tensors.
        results: the tensors that it creates, which keep their addresses.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    results: list[torch.Tensor]

    def run(self) -> None:
        for result, new in zip(self.results, tensors_in(self.func(*self.args, **self.kwargs)), strict=True):
            if result.data_ptr() != new.data_ptr():
                result.copy_(new)


def launches(func: Any) -> bool:
    """Return whether an operation launches a kernel: it is no view, and fills the memory that it allocates."""
    return not (func.is_view or func.__name__.startswith(("detach", "_unsafe_view", "alias", "empty", "new_empty")))


def _launched(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    """Count an operation, or record it for the graph that is being captured."""
    if not launches(func):
        return
    if DEVICE.recording is None:
        DEVICE.launches[_line()] += 1
        return
    DEVICE.recording.append(Operation(func, args, kwargs, tensors_in(result)))
