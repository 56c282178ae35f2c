"""Checks of the models and the cache policies that a user gives."""

from __future__ import annotations

from typing import Any

from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy


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
        UnsupportedModelError: keys of this architecture cannot be re-rotated.
    """
    if not policy.interval:
        return
    capacity = policy.keeps + policy.interval
    if capacity > lm.context_length:
        raise ValueError(
            f"the cache of {capacity} tokens exceeds the context of {lm.name}, {lm.context_length} tokens:"
            " use a smaller max_len"
        )
    _ = lm.rerotation  # raises if the keys cannot be re-rotated
