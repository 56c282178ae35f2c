"""The limit of a draft, and the controller that always sets the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from specdecode.core.result import Step

MAX_DRAFT_NODES = 64
"""Most proposals in one step, unless a smaller limit is given: wider forwards are not cheap on any device known."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Limit what a drafter may propose.

    Attributes:
        depth: most tokens on any path; 0 asks for no draft.
        nodes: most tokens in all.
    """

    depth: int
    nodes: int = MAX_DRAFT_NODES


class Controller(Protocol):
    """Decide the limit of the next proposal from the steps so far.

    `limit` has no side effects: only `observe` changes it.
    """

    def limit(self) -> Limit: ...

    def observe(self, step: Step) -> None: ...


@dataclass(frozen=True, slots=True)
class FixedK:
    """Set the same limit in every step.

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
    """Raise ValueError if a size of drafts is below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}: a draft needs at least 1 token (for none, use NoDraft)")


def examples() -> dict[str, Callable[[], Controller]]:
    """Return factories of configured controllers, by name."""
    return {"fixed": lambda: FixedK(3)}
