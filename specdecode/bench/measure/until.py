"""Repeats until each verdict on a time is clear, or the time budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Until(Generic[T]):
    """The rule for further repeats.

    Attributes:
        budget_s: seconds after which no prompt is begun.
        open_arms: from the measurements so far, returns the arms with open verdicts, and the arms they are compared
            with.
        clock: returns seconds.
        started: time of the clock at the start of the budget.
        budget_spent: whether the time budget has ended the repeats.
    """

    budget_s: float
    open_arms: Callable[[T], Collection[str]]
    clock: Callable[[], float] = time.monotonic
    started: float = field(default_factory=time.monotonic)
    budget_spent: bool = False

    def stops(self) -> bool:
        """Return whether the time budget is spent, and note it: the repeats must end now."""
        self.budget_spent = self.clock() - self.started > self.budget_s
        return self.budget_spent


def rounds(
    measured: T, prompts: Iterable[str], repeats: int, arms: Collection[str], until: Until[T] | None = None
) -> Iterator[tuple[str, int, Collection[str]]]:
    """Yield the blocks to measure: the id of a prompt, the number of the repeat, and the names of the arms.

    Args:
        measured: the measurements so far; the caller adds to them.
        prompts: ids of the prompts.
        repeats: number of repeats with all arms. A spent budget ends them early, but the first prompt is always
            measured.
        arms: names of all arms.
        until: the rule for further repeats; None for no further repeats.
    """
    chosen, begun = arms, False
    for repeat in count():
        if repeat >= repeats:
            if until is None or until.stops():
                return
            chosen = until.open_arms(measured)
            if not chosen:
                return
        for prompt in prompts:
            if until is not None and begun and until.stops():
                return
            yield prompt, repeat, chosen
            begun = True
