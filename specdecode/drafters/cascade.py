"""Proposals of the first of several drafters that has one."""

from __future__ import annotations

from specdecode.controllers.base import Limit
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.lookup import PromptLookup
from specdecode.drafters.model import ModelDrafter
from specdecode.models.lm import LM


class Cascade:
    """Asks one drafter after another, and takes the first proposal that is not empty: what costs nothing before what
    costs forwards, as a lookup before a head (SuffixDecoding, Oliaro et al. 2024, falls back on a head likewise).

    Which of them proposes depends on the text alone, so that each one's `q` is the law of the whole. A drafter that was
    not asked for some steps reads what it missed when it is.

    Args:
        drafters: in the order in which they are asked.

    Raises:
        ValueError: fewer than two, or two that read different layers of the target.
    """

    def __init__(self, *drafters: Drafter) -> None:
        if len(drafters) < 2:
            raise ValueError(f"a cascade of {len(drafters)} drafters: it takes two or more")
        reading = {drafter.layers for drafter in drafters if drafter.layers}
        if len(reading) > 1:
            raise ValueError(f"drafters that read different layers of the target: {sorted(reading)}")
        self.drafters = drafters
        self.layers = reading.pop() if reading else ()

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
