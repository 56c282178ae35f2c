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
    """Draft with the target and a short cache of attention sinks and recent tokens.

    The target verifies with the full cache, so decoding is lossless. It pays where the context is so long that reading
    the full cache takes most of a forward (MagicDec, Chen et al. 2024).

    Args:
        target: drafts for itself.
        max_len: most tokens in the draft's cache.
        sinks: tokens at the start that always stay in it.
        shape: of the draft.

    Raises:
        ValueError: no room for a window.
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
