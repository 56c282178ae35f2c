"""A drafter that is the target itself, with a short cache."""

from __future__ import annotations

from specdecode.controllers.base import Limit
from specdecode.core.tree import DraftTree
from specdecode.drafters.base import Context
from specdecode.drafters.model import ModelDrafter
from specdecode.drafters.tree_shapes import Chain, TreeShape
from specdecode.models.lm import LM
from specdecode.policies.sink_window import SinkWindow


class SelfStreamingDrafter:
    """A drafter that is the target with a short cache of attention sinks and recent tokens.

    The target verifies with the full cache, so decoding is lossless. This saves time for contexts so long that reading
    the full cache is most of a forward (MagicDec, Chen et al. 2024).

    Args:
        target: the target, which is also the draft.
        max_len: largest number of tokens in the draft's cache.
        sinks: number of tokens at the start of the text that always stay in the draft's cache.
        shape: shape of the trees.

    Raises:
        ValueError: `max_len` leaves no room for recent tokens, or exceeds the target's context.
        UnsupportedModelError: the keys of this architecture cannot be re-rotated.
    """

    layers = ()

    def __init__(self, target: LM, max_len: int = 256, sinks: int = 4, shape: TreeShape = Chain()) -> None:
        self._drafter = ModelDrafter(target, shape, SinkWindow(max_len, sinks))

    @property
    def forwards(self) -> int:
        return self._drafter.forwards

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        return self._drafter.propose(context, limit)


def examples(target: LM) -> dict[str, SelfStreamingDrafter]:
    return {"self-streaming": SelfStreamingDrafter(target, max_len=20, sinks=2)}
