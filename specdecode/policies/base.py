"""The interface of a cache policy, and the arithmetic that policies share."""

from __future__ import annotations

import sys
from typing import Protocol

from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots


class CachePolicy(Protocol):
    """A rule that chooses the slots that stay in the cache.

    A policy evicts when the committed length is a multiple of `interval` and more than `keeps` tokens are in the cache.
    At most `keeps` tokens then stay, so the cache never holds more than `keeps + interval`. Steps end at these
    boundaries, so the output tokens do not depend on drafts and acceptance.

    The tokens that stay take the positions 0, 1, 2, ... within the cache, and later tokens follow them. So memory and
    positions are bounded, however long the text is.

    Attributes:
        interval: committed tokens between evictions; 0 means no eviction.
        keeps: most tokens that an eviction leaves.
        reads_attention: whether the policy chooses by `Slots.attention`, which must then be counted.
    """

    @property
    def interval(self) -> int: ...

    @property
    def keeps(self) -> int: ...

    @property
    def reads_attention(self) -> bool: ...

    def keep(self, slots: Slots) -> Int[Tensor, "... m"]:
        """Return the filled slots that stay, ascending: one selection for all heads and layers [m], or one for each
        head [layers, heads, m]."""
        ...


def boundary(policy: CachePolicy, committed: int, cached: int) -> int:
    """Return the next committed length at which the policy evicts.

    Args:
        policy: the cache policy.
        committed: number of committed tokens so far; this length itself may be the boundary.
        cached: number of committed tokens in the cache.
    """
    if policy.interval == 0:
        return sys.maxsize
    full = committed + max(policy.keeps + 1 - cached, 0)
    return -(-full // policy.interval) * policy.interval


def bounds(max_len: int, trigger: float, interval: int | None, pinned: int, name: str = "sinks") -> tuple[int, int]:
    """Return `keeps` and `interval` of a policy.

    Args:
        max_len: most tokens in the cache.
        trigger: share of `max_len` beyond which tokens are evicted.
        interval: tokens between evictions; if None, as many as fit above the trigger.
        pinned: number of tokens that always stay.
        name: name of that number, for messages.

    Raises:
        ValueError: an argument is impossible, or the arguments do not fit together.
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
        raise ValueError(f"{name} is {pinned}: it is a number of tokens, 0 or more")
    if keeps <= pinned:
        raise ValueError(
            f"max_len is {max_len}: with {interval} tokens between evictions and a trigger of {trigger} that leaves"
            f" room for {max(keeps, 0)} tokens, of which {pinned} always stay; choose a larger max_len"
        )
    return keeps, interval
