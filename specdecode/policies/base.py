"""What a cache policy is."""

from __future__ import annotations

import sys
from typing import Protocol

from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots


class CachePolicy(Protocol):
    """Chooses the slots that stay.

    It is asked when the committed length is a multiple of `interval` and more than `keeps` tokens are in the cache, and
    then leaves `keeps` of them at most: so there are never more than `keeps + interval`. Steps are cut at these
    boundaries, and the tokens do not depend on how the drafts fell.

    What stays takes the positions 0, 1, 2, ... within the cache, and so does what is decoded next: decoding needs
    neither more memory nor more positions, however long it goes on.

    Attributes:
        interval: committed tokens between evictions; 0 means never.
        keeps: the most tokens that an eviction leaves.
        pinned: of these, the ones at the start that always stay.
        reads_attention: it chooses by `Slots.attention`, which is then kept up to date.
    """

    @property
    def interval(self) -> int: ...

    @property
    def keeps(self) -> int: ...

    @property
    def pinned(self) -> int: ...

    @property
    def reads_attention(self) -> bool: ...

    def keep(self, slots: Slots) -> Int[Tensor, "... m"]:
        """The filled slots that stay, ascending: the same of all heads and layers [m], or each head's own
        [layers, heads, m]."""
        ...


def boundary(policy: CachePolicy, committed: int, held: int) -> int:
    """The next committed length at which the policy evicts.

    Args:
        policy: whose turn it will be.
        committed: tokens so far; this length itself counts.
        held: of them, those in the cache.
    """
    if policy.interval == 0:
        return sys.maxsize
    full = committed + max(policy.keeps + 1 - held, 0)
    return -(-full // policy.interval) * policy.interval


def bounds(max_len: int, trigger: float, interval: int | None, pinned: int) -> tuple[int, int]:
    """How many tokens an eviction leaves, and after how many more the next one comes.

    Args:
        max_len: the most tokens in the cache.
        trigger: share of it beyond which tokens are evicted.
        interval: tokens between evictions; if None, what fits above the trigger.
        pinned: tokens at the start that always stay.

    Returns:
        `keeps` and `interval` of a policy.

    Raises:
        ValueError: these cannot be, one by one or together.
    """
    if not 0.0 < trigger <= 1.0:
        raise ValueError(f"trigger is {trigger}: a share of the cache is above 0 and at most 1")
    if interval is not None and interval < 1:
        raise ValueError(f"interval is {interval}: there is at least 1 token between evictions")
    most = int(trigger * max_len)
    if interval is None:
        interval = max(max_len - most, 1)
    keeps = min(most, max_len - interval)
    if pinned < 0:
        raise ValueError(f"sinks is {pinned}: as many tokens as stay at the start, 0 or more")
    if keeps <= pinned:
        raise ValueError(
            f"max_len is {max_len}: with {interval} tokens between evictions and a trigger of {trigger} that leaves"
            f" room for {max(keeps, 0)} tokens, of which {pinned} always stay; take a larger one"
        )
    return keeps, interval
