"""The interface of a drafter, and its input."""

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
    """Hold the input of a proposal.

    Attributes:
        tokens: prompt and committed tokens; the last is the root.
        vocab_size: of the target. Proposals lie below it, and `DraftTree.probs` has this width.
        sampling: of the target's tokens; a drafter that samples draws by the same rules.
        rng: the randomness of this generation.
        hidden_states: the target's hidden states after the drafter's `layers`, concatenated, at each token that the
            target has read (F = len(layers) * hidden). None if there are no such layers, and before the first step,
            which may read the rest of the prompt. They stay for the whole text, whatever a policy evicts from the
            target's cache, in the target's type: 7 kB a token for three layers of SmolLM2-135M in float32.
    """

    tokens: Sequence[int]
    vocab_size: int
    sampling: Sampling
    rng: Rng
    hidden_states: Float[Tensor, "read F"] | None = None


class Drafter(Protocol):
    """Propose continuations.

    A drafter may keep state (a cache, an index). It compares the tokens of that state with the context's and keeps
    what belongs to their longest common prefix. So a used drafter proposes what a fresh one would.

    Attributes:
        forwards: forwards of a draft model since the drafter was made.
        layers: of the target, whose hidden states it reads as `Context.hidden_states`; () for most drafters.
    """

    @property
    def forwards(self) -> int: ...

    @property
    def layers(self) -> tuple[int, ...]: ...

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        """Return a tree within the limit; the empty tree if there is nothing to propose."""
        ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
