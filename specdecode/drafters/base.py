"""What a drafter is, and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from specdecode.controllers.base import Limit
from specdecode.core.sampling import Rng, Sampling
from specdecode.core.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Context:
    """What is known when a proposal is asked for.

    Attributes:
        tokens: prompt and committed tokens; the last is the root.
        vocab_size: of the target; proposals lie below it, and `DraftTree.probs` has this width.
        sampling: how the target's tokens are chosen: a drafter that samples draws by the same rules.
        rng: the randomness of this generation.
        features: what the drafter's `layers` of the target gave at the tokens that were read, side by side, if it has
            some; None before the first step, which may read what is left of the prompt. They are kept for all of the
            text, whatever a policy evicts from the target's cache: `len(layers) * hidden` numbers a token, in the
            target's type (7 kB for three layers of SmolLM2-135M in float32).
    """

    tokens: Sequence[int]
    vocab_size: int
    sampling: Sampling
    rng: Rng
    features: Float[Tensor, "read F"] | None = None


class Drafter(Protocol):
    """Proposes continuations.

    A drafter may keep state (a cache, an index), but finds out by itself what of it still holds: it compares its own
    tokens with the context's and keeps the longest common prefix. A used drafter proposes what a fresh one would.

    Attributes:
        forwards: forwards of a draft model since the drafter was made.
        layers: of the target, whose outputs it reads as `Context.features`; for most ().
    """

    @property
    def forwards(self) -> int: ...

    @property
    def layers(self) -> tuple[int, ...]: ...

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        """A tree within the limit; the empty tree if there is nothing to propose."""
        ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
