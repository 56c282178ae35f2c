"""A drafter with a given acceptance, to measure costs where trained weights are not available."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdecode.controllers.base import Limit
from specdecode.core.transfer import write
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.model import ModelDrafter
from specdecode.models.lm import LM

# Number of consecutive tokens that identify a place in the text.
_ALIGNED = 3


class ReplayDrafter:
    """A drafter that runs another drafter, and rewrites its proposals to a given acceptance.

    From the root downwards, the first child becomes the token of the known continuation with the given probability. All
    other nodes become wrong tokens. Only the seed and the position decide whether a position is right. Results are
    synthetic: they show the cost of decoding at an acceptance, not the acceptance of a model.

    Rounding may let the target depart from the known text. Then the drafter looks for the last tokens elsewhere in the
    known text, and continues there. Until it finds them, its proposals are right by chance only.

    Args:
        inner: the drafter that proposes the trees, at its full cost.
        text: tokens of the prompt and its known continuation.
        acceptance: probability that a position is right, given that the positions before it are right.
        seed: seed of the choice of right positions.

    Attributes:
        lost: number of proposals, without empty ones, that were made at an unknown place in the text.

    Raises:
        ValueError: the acceptance is outside [0, 1].
    """

    def __init__(self, inner: Drafter, text: Sequence[int], acceptance: float, seed: int = 0) -> None:
        if not 0.0 <= acceptance <= 1.0:
            raise ValueError(f"acceptance is {acceptance}: a probability is from 0 to 1")
        self.inner = inner
        self.text = list(text)
        self.acceptance = acceptance
        self.seed = seed
        self.lost = 0

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inner.layers

    @torch.inference_mode()
    def propose(self, context: Context, limit: Limit) -> DraftTree:
        tree = self.inner.propose(context, limit)
        start = self._place(context.tokens)
        self.lost += start is None and len(tree) > 0
        known = [] if start is None else self.text[start : start + tree.depth]
        children, tokens = tree.children(), [0] * len(tree)
        level = [0]
        right: int | None = 0
        for depth in range(tree.depth):
            token = known[depth] if depth < len(known) else None
            level = [child for node in level for child in children[node]]
            for node in level:
                tokens[node - 1] = ((context.tokens[-1] if token is None else token) + 1) % context.vocab_size
            siblings = [] if right is None or token is None else children[right]
            right = siblings[0] if siblings and self._hits(len(context.tokens) + depth) else None
            if right is not None and token is not None:
                tokens[right - 1] = token
        # The inner drafter's own tree is rewritten, so that accepted nodes stay in its cache as after a right proposal.
        write(tree.tokens, torch.tensor(tokens, dtype=torch.long))
        replayed = DraftTree(tree.tokens, tree.parents)  # nothing was drawn
        for one in (tree, replayed):
            one.set_host_tokens(tokens)
        return replayed

    def _place(self, tokens: Sequence[int]) -> int | None:
        """Return the place in the known text that follows the last of these tokens; None if they do not occur in it.

        Of several places, the one nearest to `len(tokens)` counts.
        """
        due, tail = len(tokens), list(tokens[-_ALIGNED:])
        if self.text[due - len(tail) : due] == tail:
            return due
        places = range(len(tail), len(self.text) + 1)
        matches = [place for place in places if self.text[place - len(tail) : place] == tail]
        return min(matches, key=lambda place: abs(place - due), default=None)

    def _hits(self, place: int) -> bool:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        return torch.rand((), generator=generator).item() < self.acceptance


def examples(target: LM) -> dict[str, ReplayDrafter]:
    return {"replay": ReplayDrafter(ModelDrafter(target.subset([0])), range(target.vocab_size), acceptance=0.8)}
