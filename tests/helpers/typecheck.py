"""The type checker that jaxtyping's import hook applies to the package under test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args, runtime_checkable

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import config
from torch.compiler import is_compiling

FIRST_CALLS, EVERY = 5, 50
"""The first calls of a function in a test are checked, and then every so many. To check all would double a test's time.
"""

calls: dict[str, int] = {}
"""The calls of each function in the present test, by its name: a function itself might keep alive an object that a test
expects to be released.
"""

_every_call = jaxtyping.jaxtyped

# An int is accepted for a float, as in mypy.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check every argument and result. Protocols are made checkable at runtime, which only tests need."""
    for hint in getattr(function, "__annotations__", {}).values():
        _make_checkable(hint)
    return _checked(function)


def _make_checkable(hint: Any) -> None:
    if getattr(hint, "_is_protocol", False):
        runtime_checkable(hint)
    for part in get_args(hint):
        _make_checkable(part)


def some_calls(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorate as `jaxtyping.jaxtyped` does, but check only some calls of a function in each test.

    The checker is compiled at the first check: to compile one takes milliseconds, and functions within functions are
    decorated in each call.
    """

    def decorate(checkable: Any) -> Any:
        if isinstance(checkable, type):
            if is_dataclass(checkable) and not hasattr(checkable.__init__, "__wrapped__"):
                checkable.__init__ = decorate(checkable.__init__)  # type: ignore[misc]
            return checkable

        name, checked = f"{checkable.__module__}.{checkable.__qualname__}", None

        @functools.wraps(checkable)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal checked
            # The count would be part of compiled code, which would be made anew for each value.
            if config.jaxtyping_disable or is_compiling():
                return checkable(*arguments, **named)
            calls[name] = number = calls.get(name, 0) + 1
            if number > FIRST_CALLS and number % EVERY:
                return checkable(*arguments, **named)
            checked = checked or _every_call(checkable, typechecker=typechecker)
            return checked(*arguments, **named)

        return call

    return decorate
