"""Hypothesis strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st

from specdecode import DraftTree, FixedK, Step
from specdecode.controllers.base import Controller, Limit
from tests.helpers.discovery import CONTROLLERS


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12, tokens: int = 5, min_nodes: int = 0) -> DraftTree:
    """Draw any tree: parents are arbitrary earlier nodes, and siblings may propose the same token."""
    size = draw(st.integers(min_nodes, max_nodes))
    parents = [draw(st.integers(0, node)) for node in range(size)]
    proposed = [draw(st.integers(0, tokens - 1)) for _ in range(size)]
    return DraftTree(torch.tensor(proposed, dtype=torch.long), torch.tensor(parents, dtype=torch.long))


@dataclass
class Moody:
    """A controller with any limit after any other, zero included."""

    limits: list[Limit]
    steps: int = 0

    def limit(self) -> Limit:
        return self.limits[self.steps % len(self.limits)]

    def observe(self, step: Step) -> None:
        self.steps += 1


def controllers() -> st.SearchStrategy[Callable[[], Controller]]:
    """Return factories of every kind of controller, and of some with unusual limits."""
    limits = st.builds(Limit, st.integers(0, 9), st.integers(1, 64))
    return st.one_of(
        st.builds(partial, st.just(FixedK), st.integers(1, 9)),
        st.sampled_from(sorted(CONTROLLERS)).map(CONTROLLERS.__getitem__),
        st.builds(partial, st.just(Moody), st.lists(limits, min_size=1, max_size=6)),
    )
