"""A controller that drafts as deep as recent proposals were accepted."""

from __future__ import annotations

from collections.abc import Callable

from specdecode.controllers.base import MAX_DRAFT_NODES, Limit, check_positive
from specdecode.core.result import Step

OBSERVATION_DECAY = 0.98
"""Weight of an observation when the next one is made: about the last fifty decide."""


class AdaptiveK:
    """Draft as deep as the whole draft is accepted with probability one half, judged by recent steps.

    The best rule of this kind stops drafting where a rejection becomes too probable (SpecDec++, Huang et al. 2024).
    Here the bound is one half: K is the largest with a^K >= 1/2. The acceptance a of one position is estimated by
    maximum likelihood: accepted over decided proposals, which are the accepted ones and the first rejected one of each
    draft. Older decisions count less. (transformers' assisted generation drafts two more tokens after a draft that was
    accepted whole, and one less after any other. That never settles: it hovers where one draft in three is accepted
    whole.)

    It ignores costs and never stops drafting; `CostAware` does both.

    Args:
        most: the largest K.
        nodes: most proposed tokens in all, for drafters that propose trees.

    Raises:
        ValueError: most or nodes below 1.
    """

    def __init__(self, most: int = 16, nodes: int = MAX_DRAFT_NODES) -> None:
        check_positive("most", most)
        check_positive("nodes", nodes)
        self.most = most
        self.nodes = nodes
        # Prior decisions, with which K starts at 5.
        self._accepted, self._decided = 7.0, 8.0

    def limit(self) -> Limit:
        acceptance = self._accepted / self._decided
        return Limit(next((k for k in range(self.most, 1, -1) if acceptance**k >= 0.5), 1), self.nodes)

    def observe(self, step: Step) -> None:
        # Nothing is decided beyond the end of the draft or of the text.
        decided = step.accepted + (step.accepted < min(step.depth, step.emitted))
        decay = OBSERVATION_DECAY**decided
        self._accepted = decay * self._accepted + step.accepted
        self._decided = decay * self._decided + decided


def examples() -> dict[str, Callable[[], AdaptiveK]]:
    """Return factories of configured controllers, by name."""
    return {"adaptive": AdaptiveK}
