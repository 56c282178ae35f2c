"""A cache policy that keeps the keys of the smallest norm."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.core.slots import Slots
from specdecode.core.transfer import moved
from specdecode.policies.base import bounds


class KeyNorm:
    """A policy that keeps, for each head, the keys of the smallest L2 norm, which receive the most attention (Devoto et
    al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression").

    Args:
        max_len: most committed tokens in the cache.
        recent: number of latest tokens that always stay.
        trigger: share of `max_len` beyond which tokens are evicted.
        interval: tokens between evictions; by default as many as fit above the trigger.

    Raises:
        ValueError: a trigger outside (0, 1], an interval below 1, or no room beside the recent tokens.
    """

    def __init__(self, max_len: int, recent: int = 8, trigger: float = 0.9, interval: int | None = None) -> None:
        self.recent = recent
        self.keeps, self.interval = bounds(max_len, trigger, interval, recent, "recent")
        self.reads_attention = False

    def keep(self, slots: Slots) -> Int[Tensor, "layers heads m"]:
        norms = torch.stack([moved(keys.norm(dim=-1), slots.device) for keys in slots.filled_keys()])
        norms[..., slots.length - self.recent :] = 0.0
        return norms.topk(min(self.keeps, slots.length), largest=False).indices.sort().values


def examples() -> dict[str, KeyNorm]:
    return {"key-norm": KeyNorm(16, recent=4)}
