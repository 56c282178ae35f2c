"""A drafter that proposes nothing: autoregressive decoding."""

from __future__ import annotations

from dataclasses import dataclass

from specdecode.controllers.base import Limit
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context
from specdecode.models.lm import LM


@dataclass(frozen=True, slots=True)
class NoDraft:
    """A drafter that proposes the empty tree, which gives autoregressive decoding."""

    forwards = 0
    layers = ()

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        return DraftTree.empty()


def examples(target: LM) -> dict[str, NoDraft]:
    return {"none": NoDraft()}
