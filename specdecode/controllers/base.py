"""What bounds a draft, and the controller that always sets the same bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from specdecode.core.result import Step

MAX_DRAFT_NODES = 64
"""Proposals in one step, where nothing else limits them: wider forwards stop being cheap on every device we know."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that a drafter may propose.

    Attributes:
        depth: tokens on any path; 0 asks for no draft.
        nodes: tokens in all.
    """

    depth: int
    nodes: int = MAX_DRAFT_NODES


class Controller(Protocol):
    """Decides the limit of the next proposal, from what the steps before it brought.

    `limit` only tells; what changes it is `observe`.
    """

    def limit(self) -> Limit: ...

    def observe(self, step: Step) -> None: ...


@dataclass(frozen=True, slots=True)
class FixedK:
    """Always the same draft length.

    Attributes:
        k: tokens on a path, K in the literature.
        nodes: tokens in all, for drafters that propose trees.

    Raises:
        ValueError: k or nodes below 1.
    """

    k: int
    nodes: int = MAX_DRAFT_NODES

    def __post_init__(self) -> None:
        check_positive("K", self.k)
        check_positive("nodes", self.nodes)

    def limit(self) -> Limit:
        return Limit(self.k, self.nodes)

    def observe(self, step: Step) -> None:
        pass


def check_positive(name: str, value: int) -> None:
    """ValueError for a size of drafts that is below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}: a draft needs at least 1 token (for none, use NoDraft)")


def examples() -> dict[str, Callable[[], Controller]]:
    """What makes controllers, by name."""
    return {"fixed": lambda: FixedK(3)}
