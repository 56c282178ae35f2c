"""Values that users give: their checks, and their text in messages."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from specdecode.policies.base import CachePolicy

TokenIds = int | Sequence[int] | Int[Tensor, "..."] | None
"""Token ids as users give them: one, several in a list or a tensor, or None for none."""


def shape_or_text(value: Any) -> str:
    """Return a value as text for a message: the shape of a tensor, or the shortened representation of other values."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return " ".join(reprlib.repr(value).split())


def whole(name: str, value: Any) -> int:
    """Return a whole number. Raise ValueError for any other value."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {shape_or_text(value)}: it must be a whole number") from None


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return token ids, given one id, or several ids in a list, a tensor or an array.

    Raises:
        ValueError: the value is something else; the message has the name.
    """
    try:
        return (operator.index(value),)
    except TypeError:
        pass
    try:
        return tuple(map(operator.index, value.flatten().tolist() if isinstance(value, Tensor) else value))
    except TypeError:
        raise ValueError(f"{name} is {shape_or_text(value)}: it must be a token id, or several") from None


def prompt_ids(value: Any) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        ValueError: it is a text, or has several rows.
    """
    if isinstance(value, str):
        raise ValueError(f"the prompt is the text {shape_or_text(value)}: give its token ids, target.encode(text)")
    if isinstance(value, Tensor) and value.dim() != 1:
        raise ValueError(f"the prompt is {shape_or_text(value)}: give the token ids of one row, as input_ids[0]")
    return list(token_ids("the prompt", value))


def check_makers(drafter: Any, controller: Any) -> None:
    """Raise ValueError if a drafter or a controller is given, in place of a function that returns one."""
    for name, make in (("drafter", drafter), ("controller", controller)):
        if not callable(make):
            kind = type(make).__name__
            raise ValueError(f"{name} must make one for each prompt: give `lambda: {kind}(...)`, not a {kind}")


def check_room(policy: CachePolicy, *, drafts: bool) -> None:
    """Raise ValueError if tokens are to be drafted with a policy that evicts after each token, which ends a step."""
    if policy.interval == 1 and drafts:
        raise ValueError(
            "the policy evicts after each token, and a step ends there, so nothing can be drafted: use a larger"
            " interval, or a smaller trigger"
        )
