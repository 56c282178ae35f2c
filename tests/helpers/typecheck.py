"""The type checker that jaxtyping's import hook applies to the package under test."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any, get_args, runtime_checkable

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

FIRST_CALLS, EVERY = 5, 50
"""The first calls of a function in a test are checked, and then every so many. To check all would double a test's time.
"""

calls: Counter[CodeType] = Counter()
"""The calls of each function in the present test, by its code: a function itself might keep alive an object that a test
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
    """Decorate as `jaxtyping.jaxtyped` does, but check only some calls of a function in each test."""

    def decorate(checkable: Any) -> Any:
        checked = _every_call(checkable, typechecker=typechecker)
        if isinstance(checkable, type):
            return checked

        code = checkable.__code__

        @functools.wraps(checked)
        def call(*arguments: Any, **named: Any) -> Any:
            # The count would be part of compiled code, which would be made anew for each value.
            if jaxtyping.config.jaxtyping_disable or torch.compiler.is_compiling():
                return checkable(*arguments, **named)
            calls[code] = number = calls[code] + 1
            return (checked if number <= FIRST_CALLS or number % EVERY == 0 else checkable)(*arguments, **named)

        return call

    return decorate
