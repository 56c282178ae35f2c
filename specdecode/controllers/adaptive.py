"""A controller that drafts as deep as recent proposals were accepted."""

from __future__ import annotations

from collections.abc import Callable

from specdecode.controllers.base import MAX_DRAFT_NODES, Limit, check_positive
from specdecode.core.result import Step

OBSERVATION_DECAY = 0.98
"""Factor on the weight of all earlier observations at each new one: about the last fifty matter."""


class AdaptiveK:
    """A controller that chooses the largest K whose whole draft is accepted with probability one half or more.

    The best rule of this kind stops drafting where a rejection becomes too probable (SpecDec++, Huang et al. 2024).
    Here the bound is one half: K is the largest with a^K >= 1/2. The acceptance a of one position is estimated by
    maximum likelihood: accepted proposals over decided proposals. Decided are the accepted proposals and the first
    rejected one of each draft. Older decisions count less. (transformers' assisted generation drafts two more tokens
    after a fully accepted draft, and one less after any other. Its length never settles: it hovers where one draft in
    three is fully accepted.)

    The controller ignores costs and never stops drafting. `CostAware` considers costs, and can stop.

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
        # Prior decisions. With them, K starts at 5.
        self._accepted, self._decided = 7.0, 8.0

    def limit(self) -> Limit:
        acceptance = self._accepted / self._decided
        return Limit(next((k for k in range(self.most, 1, -1) if acceptance**k >= 0.5), 1), self.nodes)

    def observe(self, step: Step) -> None:
        # Proposals beyond the end of the draft or of the text are undecided.
        decided = step.accepted + (step.accepted < min(step.depth, step.emitted))
        decay = OBSERVATION_DECAY**decided
        self._accepted = decay * self._accepted + step.accepted
        self._decided = decay * self._decided + decided


def examples() -> dict[str, Callable[[], AdaptiveK]]:
    """Return factories of configured controllers, by name."""
    return {"adaptive": AdaptiveK}
