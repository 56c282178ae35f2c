"""The keys of an arm: their types, and the parts that accept them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdecode.support.kinds import FLAG, NUMBER, OPTIONS, STRING, WHOLE, WHOLES, is_of

TYPES = {
    "draft": STRING,
    "drafter": STRING,
    "head": STRING,
    "ngram": WHOLE,
    "min_ngram": WHOLE,
    "branches": WHOLE,
    "draft_cache": WHOLE,
    "shape": STRING,
    "branching": WHOLES,
    "nodes": WHOLE,
    "threshold": NUMBER,
    "controller": STRING,
    "k": WHOLE,
    "policy": STRING,
    "cache": WHOLE,
    "quantize": STRING,
    "backend": STRING,
    "replay": NUMBER,
    "batch": WHOLE,
    "peer": STRING,
    "confidence": NUMBER,
    "early_exit": WHOLE,
    "against": STRING,
    "baseline": STRING,
    "call": STRING,
    "options": OPTIONS,
    "limit_s": NUMBER,
    "lossy": FLAG,
    "server": OPTIONS,
    "concurrency": WHOLE,
    "requests": WHOLE,
}
PRESET_KEYS = tuple(key for key in TYPES if key != "draft")
"""The keys of a preset's arm."""

POLICY_CACHE_TOKENS = 256
"""Default number of tokens in the cache of a policy."""

CALL_KEYS = ("call", "options", "limit_s", "lossy", "baseline")
"""The keys of an arm from code."""

SERVER_KEYS = ("server", "concurrency", "requests", "limit_s", "lossy", "baseline")
"""The keys of an arm that a server decodes."""

_MEASURED_KEYS = ("backend", "replay", "batch", "peer", "confidence", "early_exit", "against", *CALL_KEYS, *SERVER_KEYS)
MODEL_KEYS = tuple(key for key in TYPES if key not in _MEASURED_KEYS)
"""The keys of a way to decode outside of measurements."""

# The kinds of each part of an arm, and the keys that each kind accepts.
DRAFTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "lookup": ("ngram", "min_ngram", "branches", "replay"),
    "head": ("head", "shape", "replay"),
    "mtp": ("shape", "replay"),
    "medusa": ("head", "shape", "replay"),
    "model": ("draft", "shape", "replay"),
    "universal": ("draft", "replay"),
    "self-streaming": ("draft_cache", "shape", "replay"),
}
SHAPES: dict[str, tuple[str, ...]] = {
    "chain": (),
    "static": ("branching", "nodes"),
    "best-first": ("nodes", "threshold"),
}
CONTROLLERS: dict[str, tuple[str, ...]] = {"fixed": ("k",), "adaptive": (), "cost-aware": ()}
PEERS: dict[str, tuple[str, ...]] = {
    "generate": (),
    "generate-compiled": (),
    "assisted": ("k", "confidence"),
    "universal": ("k", "confidence"),
    "early-exit": ("k", "confidence", "early_exit"),
    "prompt-lookup": ("k", "ngram"),
}


def loss_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an arm that change its outputs: the cache policy with its settings, and the weights."""
    return {key: value for key, value in options.items() if key in ("policy", "cache", "quantize") or key not in TYPES}


def typed(key: str, value: Any) -> Any:
    """Return the value of a key in its type. Whole numbers become floats for a key of numbers, and lists become tuples.

    A key that no arm has belongs to a policy. The values of a policy are numbers.

    Raises:
        ValueError: the value has another type.
    """
    kind = TYPES.get(key, NUMBER)
    if not is_of(kind, value):
        raise ValueError(f"{key} is {value!r}: it must be {kind}")
    if kind == WHOLES:
        return tuple(value)
    return float(value) if kind == NUMBER and key in TYPES else value
