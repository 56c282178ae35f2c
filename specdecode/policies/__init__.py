"""Cache policies choose the tokens to evict. Each policy is a file, whose name is the policy's name. Its `examples()`
returns configured instances for tests."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, get_type_hints

from specdecode.policies.base import CachePolicy


@cache
def policy(name: str, max_len: int, /, **settings: Any) -> CachePolicy:
    """Return a policy by its name. Equal arguments give the same object, so that equal arms can be recognised.

    Args:
        name: name of the policy's file, with dashes: "sink-window".
        max_len: most committed tokens in the cache.
        settings: other arguments of the policy; by default its own defaults.

    Raises:
        ValueError: no such policy or setting, or the cache is too small for the policy.
    """
    files = [module.name for module in iter_modules(__path__) if module.name not in ("base", "keep_all")]
    names = [file.replace("_", "-") for file in files]
    if name not in names:
        raise ValueError(f"no cache policy is named {name!r}: choose from {', '.join(names)}")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    policy_class = getattr(module, name.title().replace("-", ""))
    types = get_type_hints(policy_class.__init__)
    if unknown := settings.keys() - (types.keys() - {"max_len", "return"}):
        raise ValueError(f"the cache policy {name} has no setting {min(unknown)!r}")
    for setting, value in settings.items():
        whole = types[setting] is not float
        if isinstance(value, bool) or not isinstance(value, types[setting] if whole else int | float):
            needed = "a whole number" if whole else "a number"
            raise ValueError(f"{setting} of the cache policy {name} is {value!r}: it must be {needed}")
    instance: CachePolicy = policy_class(max_len, **settings)
    return instance
