"""A drafter that asks several drafters in turn."""

from __future__ import annotations

from specdecode.controllers.base import Limit
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.lookup import PromptLookup
from specdecode.drafters.model import ModelDrafter
from specdecode.models.lm import LM


class Cascade:
    """A drafter that asks several drafters in turn, and uses the first proposal that is not empty.

    Put a drafter without forwards before one with forwards, such as a lookup before a head (SuffixDecoding, Oliaro et
    al. 2024, uses a head as a fallback too). The choice of the drafter depends on the text alone, so its `probs` remain
    exact. A drafter that was not asked in some steps reads the missed tokens when it is asked again.

    Args:
        drafters: two drafters or more, in the order in which they are asked.

    Raises:
        ValueError: there are fewer than two drafters, or two of them read different layers of the target.
    """

    def __init__(self, *drafters: Drafter) -> None:
        if len(drafters) < 2:
            raise ValueError(f"a cascade of {len(drafters)} drafters: give two or more")
        layers = {drafter.layers for drafter in drafters if drafter.layers}
        if len(layers) > 1:
            raise ValueError(f"the drafters of a cascade may not read different layers of the target: {sorted(layers)}")
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
