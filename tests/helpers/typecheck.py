"""The type checker that jaxtyping's import hook puts on the package while it is tested."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any, get_args, runtime_checkable

import jaxtyping
from beartype import BeartypeConf, beartype

FIRST_CALLS, EVERY = 20, 25
"""Of a function the first calls in a test are checked, and then one of so many: to check all takes as long as what is
tested."""

calls: Counter[CodeType] = Counter()
"""Of each function, in the present test. (A function itself might hold what a test waits to see released.)"""

_every_call = jaxtyping.jaxtyped

# An int will do for a float, as it does for mypy.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check every argument and result, those declared by a protocol too: only here need that be possible at runtime."""
    for hint in getattr(function, "__annotations__", {}).values():
        _make_checkable(hint)
    return _checked(function)


def _make_checkable(hint: Any) -> None:
    if getattr(hint, "_is_protocol", False):
        runtime_checkable(hint)
    for part in get_args(hint):
        _make_checkable(part)


def some_calls(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorate as `jaxtyping.jaxtyped` does, but check some calls of a function in each test, not all."""

    def decorate(checkable: Any) -> Any:
        checked = _every_call(checkable, typechecker=typechecker)
        if isinstance(checkable, type):
            return checked

        code = checkable.__code__

        @functools.wraps(checked)
        def call(*arguments: Any, **named: Any) -> Any:
            calls[code] = number = calls[code] + 1
            return (checked if number <= FIRST_CALLS or number % EVERY == 0 else checkable)(*arguments, **named)

        return call

    return decorate
