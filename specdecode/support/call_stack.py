"""Room on Python's call stack, so that the speed of a function does not depend on how deep its caller is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_SLOTS = 2**14
"""Size of a frame, in pointers of 8 bytes. With its header the frame is larger than 128 KiB. So Python takes a chunk of
256 KiB, and half of it is left for the calls below."""


def with_stack_room(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, with room on Python's stack for some hundreds of nested calls.

    Since Python 3.11 frames lie in chunks of 16 KiB. A call that does not fit into the rest of a chunk asks the system
    for another chunk, and gives it back when it returns. If a loop runs just there, every call in it pays for that
    (https://github.com/python/cpython/issues/142183; Python 3.15 and later releases of 3.13 and 3.14 keep one chunk).
    A forward makes hundreds of such calls. While other threads run, each takes as long as a small kernel.
    `python -m perf.call_stack` measures it.
    """

    def call(*arguments: P.args, **named: P.kwargs) -> T:
        return function(*arguments, **named)

    call.__code__ = call.__code__.replace(co_stacksize=_SLOTS)
    return wraps(function)(call)
