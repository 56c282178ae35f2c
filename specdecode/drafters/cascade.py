"""A drafter that asks several drafters in turn."""

from __future__ import annotations

from specdecode.controllers.base import Limit
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.lookup import PromptLookup
from specdecode.drafters.model import ModelDrafter
from specdecode.models.lm import LM


class Cascade:
    """Ask one drafter after another, and take the first proposal that is not empty.

    A drafter that costs nothing comes before one that costs forwards, as a lookup before a head (SuffixDecoding,
    Oliaro et al. 2024, falls back on a head likewise). The text alone decides which of them proposes, so each one's
    `probs` remain exact. A drafter that was not asked for some steps later reads what it missed.

    Args:
        drafters: in the order in which they are asked.

    Raises:
        ValueError: fewer than two, or two that read different layers of the target.
    """

    def __init__(self, *drafters: Drafter) -> None:
        if len(drafters) < 2:
            raise ValueError(f"a cascade of {len(drafters)} drafters: it takes two or more")
        layers = {drafter.layers for drafter in drafters if drafter.layers}
        if len(layers) > 1:
            raise ValueError(f"drafters that read different layers of the target: {sorted(layers)}")
        self.drafters = drafters
        self.layers = layers.pop() if layers else ()

    @property
    def forwards(self) -> int:
        return sum(drafter.forwards for drafter in self.drafters)

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        for drafter in self.drafters:
            if len(tree := drafter.propose(context, limit)):
                return tree
        return DraftTree.empty()


def examples(target: LM) -> dict[str, Cascade]:
    return {"cascade": Cascade(PromptLookup(min_ngram=2), ModelDrafter(target.subset([0])))}
