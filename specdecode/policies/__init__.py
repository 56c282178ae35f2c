"""What stays in the cache. One policy a file, named as the file is; `examples()` gives the tests configured ones."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import Any

from specdecode.policies.base import CachePolicy


@cache
def policy(name: str, max_len: int, **settings: Any) -> CachePolicy:
    """A policy by its name, with all else at its default: the same one for the same arguments, so that what decodes
    alike can be told.

    Args:
        name: of the file, with dashes: "sink-window".
        max_len: the most committed tokens in the cache.
        settings: what else is not at its default.

    Raises:
        ValueError: no such policy or setting of it, or a cache that is too small for it.
    """
    known = [found.name.replace("_", "-") for found in iter_modules(__path__) if found.name not in ("base", "keep_all")]
    if name not in known:
        raise ValueError(f"no cache policy is named {name!r}: choose from {', '.join(known)}")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    kind = getattr(module, name.title().replace("-", ""))
    if unknown := settings.keys() - signature(kind).parameters.keys():
        raise ValueError(f"the cache policy {name} has no setting {min(unknown)!r}")
    made: CachePolicy = kind(max_len, **settings)
    return made
