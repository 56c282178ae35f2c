"""Measure as long as it takes: until each verdict on a time is clear, or the time is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Until(Generic[T]):
    """When to stop.

    Attributes:
        budget_s: seconds after which no prompt is begun.
        open_arms: takes what was measured, and returns the arms whose verdicts are open, with those that they are
            compared with.
        clock: in seconds.
        started: when the budget began.
    """

    budget_s: float
    open_arms: Callable[[T], Collection[str]]
    clock: Callable[[], float] = time.monotonic
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return self.clock() - self.started > self.budget_s


def rounds(
    measured: T, prompts: Iterable[str], repeats: int, arms: Collection[str], until: Until[T] | None = None
) -> Iterator[tuple[str, int, Collection[str]]]:
    """Say what is measured next: a prompt, which repeat it is, and the names of the arms.

    Args:
        measured: so far; the caller adds to it.
        prompts: by id.
        repeats: of all arms, at least; the first prompt is measured in any case.
        arms: names of all.
        until: says what comes then; None for nothing.
    """
    chosen, begun = arms, False
    for repeat in count():
        if repeat >= repeats:
            if until is None or until.spent:
                return
            chosen = until.open_arms(measured)
            if not chosen:
                return
        for prompt in prompts:
            if until is not None and until.spent and begun:
                return
            yield prompt, repeat, chosen
            begun = True
