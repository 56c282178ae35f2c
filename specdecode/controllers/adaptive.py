"""Draft as deep as proposals were accepted lately."""

from __future__ import annotations

from collections.abc import Callable

from specdecode.controllers.base import MAX_DRAFT_NODES, Limit, check_positive
from specdecode.core.result import Step

KEPT = 0.98
"""What an observation still counts when the next one is made: the last fifty or so decide."""


class AdaptiveK:
    """As deep as a draft still holds with probability one half, by what was accepted lately.

    The best rule of this kind stops drafting where a rejection becomes too probable (SpecDec++, Huang et al. 2024).
    Here that is one half: K is the largest with a^K >= 1/2. The acceptance of a position, a, is estimated by maximum
    likelihood: accepted proposals over decided ones, which are the accepted and the first rejected one of each draft.
    The older a decision, the less it counts. (transformers' assisted generation drafts two more tokens after a draft
    that was accepted whole and one less after any other: that never comes to rest, and hovers where a draft is accepted
    whole once in three times.)

    It knows no costs and never stops drafting: that is for `CostAware`.

    Args:
        most: the largest K.
        nodes: tokens in all, for drafters that propose trees.

    Raises:
        ValueError: most or nodes below 1.
    """

    def __init__(self, most: int = 16, nodes: int = MAX_DRAFT_NODES) -> None:
        check_positive("most", most)
        check_positive("nodes", nodes)
        self.most = most
        self.nodes = nodes
        # As if decided before: K starts at 5.
        self._accepted, self._decided = 7.0, 8.0

    def limit(self) -> Limit:
        acceptance = self._accepted / self._decided
        return Limit(next((k for k in range(self.most, 1, -1) if acceptance**k >= 0.5), 1), self.nodes)

    def observe(self, step: Step) -> None:
        # Nothing is decided behind the end of the draft, or of the text.
        decided = step.accepted + (step.accepted < min(step.depth, step.emitted))
        kept = KEPT**decided
        self._accepted = kept * self._accepted + step.accepted
        self._decided = kept * self._decided + decided


def examples() -> dict[str, Callable[[], AdaptiveK]]:
    """What makes controllers, by name."""
    return {"adaptive": AdaptiveK}
