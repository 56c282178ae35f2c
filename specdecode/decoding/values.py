"""Values that users give: their checks, and their text in messages."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        return _several(name, value, "a token id, or several")


def _several(name: str, value: Any, expected: str) -> tuple[int, ...]:
    """Return several token ids. Raise ValueError, with a text of what is expected, for another value."""
    try:
        return tuple(map(operator.index, value.flatten().tolist() if isinstance(value, Tensor) else value))
    except TypeError:
        raise ValueError(f"{name} is {shape_or_text(value)}: it must be {expected}") from None


def prompt_ids(value: Any) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        ValueError: it is a text, a single number or something else, or has several rows.
    """
    if isinstance(value, str):
        raise ValueError(f"the prompt is the text {shape_or_text(value)}: give its token ids, target.encode(text)")
    if isinstance(value, Tensor) and value.dim() != 1:
        raise ValueError(f"the prompt is {shape_or_text(value)}: give the token ids of one row, such as input_ids[0]")
    return list(_several("the prompt", value, "a list of token ids"))


def check_makers(drafter: Any, controller: Any) -> None:
    """Raise ValueError if a drafter or a controller is given, in place of a function that returns one."""
    for name, make in (("drafter", drafter), ("controller", controller)):
        if not callable(make):
            raise ValueError(
                f"{name} is of type {type(make).__name__}: give a function that makes one for each prompt, such as"
                f" `lambda: {_PARTS[name].example}`"
            )


class _Part(NamedTuple):
    """An attribute that each part of this kind has, and an example."""

    attribute: str
    example: str


_PARTS = {
    "drafter": _Part("propose", "ModelDrafter(draft)"),
    "controller": _Part("observe", "FixedK(5)"),
    "policy": _Part("interval", "SinkWindow(256)"),
    "sampling": _Part("greedy", "Sampling(temperature=0.7)"),
}


def check_parts(**parts: Any) -> None:
    """Raise ValueError if an argument is not the kind of part that its name says: drafter, controller and so on."""
    for name, value in parts.items():
        if not hasattr(value, _PARTS[name].attribute) or isinstance(value, type):
            raise ValueError(f"{name} is of type {type(value).__name__}: give one, such as {_PARTS[name].example}")


def check_room(policy: CachePolicy, *, drafts: bool) -> None:
    """Raise ValueError if tokens are to be drafted with a policy that evicts after each token, which ends a step."""
    if policy.interval == 1 and drafts:
        raise ValueError(
            "the policy evicts after each token, and a step ends there, so nothing can be drafted: use a larger"
            " interval, or a smaller trigger"
        )
