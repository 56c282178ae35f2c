"""Checks of the models and the cache policies that a user gives."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from specdecode.core.errors import UnsupportedModelError
from specdecode.models.lm import LM
from specdecode.models.variants import layer_configs
from specdecode.policies.base import CachePolicy
from specdecode.policies.heavy_hitter import HeavyHitter
from specdecode.policies.key_norm import KeyNorm


def check_lm(what: str, value: Any) -> None:
    """Raise ValueError if a value is no LM.

    Args:
        what: name of the argument, for the message.
        value: the argument.
    """
    if not isinstance(value, LM):
        way = f"specdecode.load({value!r})" if isinstance(value, str) else "specdecode.LM(model, tokenizer)"
        raise ValueError(f"the {what} is a {type(value).__name__}, and must be an LM: give {way}")


def check_cache_fits(policy: CachePolicy, lm: LM) -> None:
    """Check that a model can decode with a policy that evicts.

    Positions are counted within the cache, so the cache must fit the model's context; the text need not.

    Raises:
        ValueError: the cache exceeds the model's context.
        UnsupportedModelError: keys of this architecture cannot be re-rotated, or not be chosen for each head.
    """
    if not policy.interval:
        return
    capacity = policy.keeps + policy.interval
    if capacity > lm.context_length:
        raise ValueError(
            f"the cache of {capacity} tokens exceeds the context of {lm.name}, {lm.context_length} tokens:"
            " use a smaller max_len"
        )
    if reason := _heads_reason(policy, lm.config):
        raise UnsupportedModelError(
            f"{type(policy).__name__} cannot choose the keys of {lm.name} for each head, as its layers {reason}: use a"
            " policy that chooses for all heads, such as SinkWindow"
        )
    _ = lm.rerotation  # raises if the keys cannot be re-rotated


def _heads_reason(policy: CachePolicy, config: PretrainedConfig) -> str | None:
    """Return what layers do so that no policy can choose their keys for each head; None if this one can."""
    if isinstance(policy, HeavyHitter) and getattr(config, "num_kv_shared_layers", None):
        return "read each other's keys"  # so attention is recorded for more layers than have keys
    if isinstance(policy, HeavyHitter | KeyNorm):
        counts = sorted({getattr(layer, "num_key_value_heads", None) or 0 for layer in layer_configs(config)})
        if len(counts) > 1:
            return f"have different numbers of heads with keys ({', '.join(map(str, counts))})"
    return None
