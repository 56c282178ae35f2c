"""How long to draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from specdecode.result import Step

MAX_DRAFT_NODES = 64
"""Proposals in one step, where nothing else limits them: wider forwards stop being cheap on every device we know."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that a drafter may propose.

    Attributes:
        depth: tokens on any path.
        nodes: tokens in all.
    """

    depth: int
    nodes: int = MAX_DRAFT_NODES


class Controller(Protocol):
    """Decides the limit of the next proposal, from what the steps before it brought."""

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
        if self.k < 1:
            raise ValueError(f"K is {self.k}: a draft needs at least 1 token (for none, use NoDraft)")
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}: a draft needs at least 1 token (for none, use NoDraft)")

    def limit(self) -> Limit:
        return Limit(self.k, self.nodes)

    def observe(self, step: Step) -> None:
        pass
