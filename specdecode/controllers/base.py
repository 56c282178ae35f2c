"""The limit of a draft, and the controller that always sets the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from specdecode.core.result import Step

MAX_DRAFT_NODES = 64
"""Default limit of proposals in one step: wider forwards are expensive on every tested device."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest proposal that a drafter may make.

    Attributes:
        depth: most tokens on any path; 0 asks for no draft.
        nodes: most tokens in all.
    """

    depth: int
    nodes: int = MAX_DRAFT_NODES


class Controller(Protocol):
    """An object that decides the limit of the next proposal from the steps so far.

    `limit` has no side effects: only `observe` changes its result.
    """

    def limit(self) -> Limit: ...

    def observe(self, step: Step) -> None: ...


@dataclass(frozen=True, slots=True)
class FixedK:
    """A controller that sets the same limit in every step.

    Attributes:
        k: most tokens on a path, K in the literature.
        nodes: most tokens in all, for drafters that propose trees.

    Raises:
        ValueError: k or nodes below 1.
    """

    k: int = 5
    nodes: int = MAX_DRAFT_NODES

    def __post_init__(self) -> None:
        check_positive("K", self.k)
        check_positive("nodes", self.nodes)

    def limit(self) -> Limit:
        return Limit(self.k, self.nodes)

    def observe(self, step: Step) -> None:
        pass


def check_positive(name: str, value: int) -> None:
    """Raise ValueError if a draft size is below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}: a draft needs at least 1 token (for none, use NoDraft)")


def examples() -> dict[str, Callable[[], Controller]]:
    """Return factories of configured controllers, by name."""
    return {"fixed": lambda: FixedK(3)}
