"""A cache policy that keeps the keys with the most attention."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots
from specdecode.policies.base import bounds


class HeavyHitter:
    """A policy that keeps, for each head, the keys with the most attention and the recent keys (H2O, Zhang et al.
    2023).

    Only the attention of committed tokens counts: a rejected proposal leaves no trace.

    Args:
        max_len: most committed tokens in the cache.
        recent: number of latest tokens that always stay; by default half of the tokens that stay, as in H2O.
        trigger: share of `max_len` beyond which tokens are evicted.
        interval: tokens between evictions; by default as many as fit above the trigger.

    Raises:
        ValueError: a trigger outside (0, 1], an interval below 1, or no room beside the recent tokens.
    """

    def __init__(
        self, max_len: int, recent: int | None = None, trigger: float = 0.9, interval: int | None = None
    ) -> None:
        self.recent = bounds(max_len, trigger, interval, 0)[0] // 2 if recent is None else recent
        self.keeps, self.interval = bounds(max_len, trigger, interval, self.recent, "recent")
        self.reads_attention = True

    def keep(self, slots: Slots) -> Int[Tensor, "layers heads m"]:
        received = slots.attention[:, :, : slots.length].clone()
        received[..., slots.length - self.recent :] = torch.inf
        return received.topk(min(self.keeps, slots.length)).indices.sort().values


def examples() -> dict[str, HeavyHitter]:
    return {"heavy-hitter": HeavyHitter(16)}
