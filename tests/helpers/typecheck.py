"""The type checker that jaxtyping's import hook puts on the package while it is tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, runtime_checkable

from beartype import BeartypeConf, beartype

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
