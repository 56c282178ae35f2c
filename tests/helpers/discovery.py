"""Discovery of drafters, policies and controllers: a new one is tested without another line."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from specdecode import LM, controllers, drafters, policies
from specdecode.drafters.base import Drafter
from specdecode.policies.base import CachePolicy


def _modules(package: ModuleType) -> dict[str, ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if "examples" in vars(module)}


DRAFTERS = _modules(drafters)

POLICIES: dict[str, CachePolicy] = {
    name: policy for module in _modules(policies).values() for name, policy in module.examples().items()
}

CONTROLLERS = {name: make for module in _modules(controllers).values() for name, make in module.examples().items()}


def examples(file: str, target: LM) -> dict[str, Drafter]:
    """Return the configured instances of one drafter's file, new at every call."""
    return DRAFTERS[file].examples(target)
