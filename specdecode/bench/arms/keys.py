"""The keys of an arm: their types, and the parts that take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_STRING, _WHOLE, _NUMBER, _WHOLES = "a string", "a whole number", "a number", "a list of whole numbers"
_TABLE, _FLAG = "a table of options", "true or false"
TYPES = {
    "draft": _STRING,
    "drafter": _STRING,
    "head": _STRING,
    "ngram": _WHOLE,
    "min_ngram": _WHOLE,
    "branches": _WHOLE,
    "draft_cache": _WHOLE,
    "shape": _STRING,
    "branching": _WHOLES,
    "nodes": _WHOLE,
    "threshold": _NUMBER,
    "controller": _STRING,
    "k": _WHOLE,
    "policy": _STRING,
    "cache": _WHOLE,
    "quantize": _STRING,
    "backend": _STRING,
    "replay": _NUMBER,
    "batch": _WHOLE,
    "peer": _STRING,
    "confidence": _NUMBER,
    "against": _STRING,
    "baseline": _STRING,
    "call": _STRING,
    "options": _TABLE,
    "limit_s": _NUMBER,
    "lossy": _FLAG,
    "server": _TABLE,
    "concurrency": _WHOLE,
    "requests": _WHOLE,
}
PRESET_KEYS = tuple(key for key in TYPES if key != "draft")
"""The keys of a preset's arm."""

POLICY_CACHE_TOKENS = 256
"""Tokens that a cache policy holds, where the arm does not say."""

CALL_KEYS = ("call", "options", "limit_s", "lossy", "baseline")
"""The keys of an arm from code."""

SERVER_KEYS = ("server", "concurrency", "requests", "limit_s", "lossy", "baseline")
"""The keys of an arm that a server decodes."""

_MEASURED_KEYS = ("backend", "replay", "batch", "peer", "confidence", "against", *CALL_KEYS, *SERVER_KEYS)
MODEL_KEYS = tuple(key for key in TYPES if key not in _MEASURED_KEYS)
"""The keys of a way to decode that is not measured."""

# The parts of an arm, and the keys that each kind of them takes.
DRAFTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "lookup": ("ngram", "min_ngram", "branches", "replay"),
    "head": ("head", "shape", "replay"),
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
    "prompt-lookup": ("k", "ngram"),
}


def typed(key: str, value: Any) -> Any:
    """Return the value of a key in its type: a whole number where a number is asked for as a float, a list as a tuple.

    Raises:
        ValueError: it has another type. A key that is none of an arm's is a policy's, whose values are numbers.
    """
    kind = TYPES.get(key, _NUMBER)
    if not _IS_OF_TYPE[kind](value):
        raise ValueError(f"{key} is {value!r}: it must be {kind}")
    if kind == _WHOLES:
        return tuple(value)
    return float(value) if kind == _NUMBER and key in TYPES else value


_IS_OF_TYPE: dict[str, Callable[[Any], bool]] = {
    _STRING: lambda value: isinstance(value, str),
    _WHOLE: lambda value: isinstance(value, int) and not isinstance(value, bool),
    _NUMBER: lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    _TABLE: lambda value: isinstance(value, dict),
    _FLAG: lambda value: isinstance(value, bool),
    _WHOLES: lambda value: isinstance(value, list | tuple) and all(map(_IS_OF_TYPE[_WHOLE], value)),
}
