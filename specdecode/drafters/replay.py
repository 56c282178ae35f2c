"""A drafter of set acceptance: it measures costs where trained weights are not available."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdecode.controllers.base import Limit
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.model import ModelDrafter
from specdecode.models.lm import LM


class ReplayDrafter:
    """Pay for another drafter's proposals, then rewrite them to a set acceptance.

    From the root downwards, the first child becomes the token of the known continuation with the given probability;
    all other children become wrong. The seed and the position alone decide whether a position is proposed right.
    Results are synthetic: they show the cost of decoding at an acceptance, not the acceptance of a model.

    Args:
        inner: proposes the tree whose cost is paid.
        text: the prompt and its known continuation.
        acceptance: probability that a position is proposed right, given that those before it were.
        seed: of the choice.

    Raises:
        ValueError: an acceptance outside [0, 1].
    """

    def __init__(self, inner: Drafter, text: Sequence[int], acceptance: float, seed: int = 0) -> None:
        if not 0.0 <= acceptance <= 1.0:
            raise ValueError(f"acceptance is {acceptance}: a probability is from 0 to 1")
        self.inner = inner
        self.text = list(text)
        self.acceptance = acceptance
        self.seed = seed

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inner.layers

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tree = self.inner.propose(context, limit)
        children = tree.children()
        tokens = tree.tokens.tolist()
        right: int | None = 0
        for depth in range(tree.depth):
            place = len(context.tokens) + depth
            if right is None or place >= len(self.text):
                break
            right_token = self.text[place]
            siblings = children[right]
            for node in siblings:
                tokens[node - 1] = (right_token + 1) % context.vocab_size
            right = None
            if siblings and self._hits(place):
                right = siblings[0]
                tokens[right - 1] = right_token
        return DraftTree(torch.tensor(tokens, dtype=torch.long), tree.parents)

    def _hits(self, place: int) -> bool:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        return torch.rand((), generator=generator).item() < self.acceptance


def examples(target: LM) -> dict[str, ReplayDrafter]:
    return {"replay": ReplayDrafter(ModelDrafter(target.subset([0])), range(target.vocab_size), acceptance=0.8)}
