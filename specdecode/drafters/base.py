"""What a drafter is, and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from specdecode.controller import Limit
from specdecode.sampling import Rng, Sampling
from specdecode.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Context:
    """What is known when a proposal is asked for.

    Attributes:
        tokens: prompt and committed tokens; the last is the root.
        vocab_size: of the target; proposals lie below it, and `DraftTree.probs` has this width.
        sampling: how the target's tokens are chosen: a drafter that samples draws by the same rules.
        rng: the randomness of this generation.
    """

    tokens: Sequence[int]
    vocab_size: int
    sampling: Sampling
    rng: Rng


class Drafter(Protocol):
    """Proposes continuations.

    A drafter may keep state (a cache, an index), but finds out by itself what of it still holds: it compares its own
    tokens with the context's and keeps the longest common prefix. A used drafter proposes what a fresh one would.

    Attributes:
        forwards: forwards of a draft model since the drafter was made.
    """

    @property
    def forwards(self) -> int: ...

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        """A tree within the limit; the empty tree if there is nothing to propose."""
        ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
