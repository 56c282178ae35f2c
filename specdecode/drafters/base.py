"""The interface of drafters, and their input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from specdecode.controllers.base import MAX_DRAFT_NODES, Limit
from specdecode.core.sampling import Rng, Sampling
from specdecode.core.tree import DraftTree
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll

# Largest number of slots that are allocated at the start for new tokens. Later growth doubles the slots.
_NEW_TOKEN_SLOTS = 2048


@dataclass(frozen=True, slots=True)
class Context:
    """The input of a proposal.

    Attributes:
        tokens: tokens of the prompt and all committed tokens. The last is the root.
        vocab_size: size V of the target's vocabulary. Proposed ids are below it, and `DraftTree.probs` has this width.
        sampling: the rule that chooses the target's tokens. A drafter that samples uses the same rule.
        rng: the randomness of this generation.
        hidden_states: [read, F] the target's hidden states after the drafter's `layers`, concatenated, at each token
            that the target has read (F = len(layers) * hidden). None without such layers, and in the first step, when
            the target may not have read the whole prompt. They are in the target's type, and stay for the whole text,
            even if a policy evicts from the target's cache: 7 kB per token for three layers of SmolLM2-135M in float32.
        first: whether no token has been committed yet. A drafter that would have to read the prompt in forwards of its
            own then proposes nothing, so that the first token comes as early as in plain decoding.
        length_limit: most tokens that the text may have in the end, to choose the size of a cache; None if unknown.
    """

    tokens: Sequence[int]
    vocab_size: int
    sampling: Sampling
    rng: Rng
    hidden_states: Float[Tensor, "read F"] | None = None
    first: bool = False
    length_limit: int | None = None


class Drafter(Protocol):
    """An object that proposes continuations.

    A drafter may keep state (a cache, an index). It compares the tokens of that state with the tokens of the context,
    and keeps the part for their longest common prefix. So a used drafter and a fresh one propose the same tree.

    Attributes:
        forwards: number of forwards of a draft model since the drafter was created.
        layers: the target's layers whose hidden states the drafter reads as `Context.hidden_states`; () for most
            drafters.
    """

    @property
    def forwards(self) -> int: ...

    @property
    def layers(self) -> tuple[int, ...]: ...

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        """Return a tree within the limit, or the empty tree if there is nothing to propose.

        Args:
            context: the text so far, and the rules of the proposal.
            limit: largest depth and number of nodes of the tree.
        """
        ...


def slots_for(length: int, length_limit: int | None, policy: CachePolicy = KeepAll()) -> int:
    """Return the number of slots to begin with for a text and the proposals after it.

    A cache that grows moves its tensors, so that all CUDA graphs for them are captured anew.

    Args:
        length: number of tokens of the text so far.
        length_limit: most tokens that the text may have in the end; None if unknown.
        policy: the policy of the cache.
    """
    if policy.interval:
        return policy.keeps + policy.interval + MAX_DRAFT_NODES
    return min(length_limit or length, length + _NEW_TOKEN_SLOTS) + MAX_DRAFT_NODES


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two texts."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
