"""Finds the drafters by their files, so that a new one is tested without another line."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from specdecode import LM, drafters
from specdecode.drafters.base import Drafter


def _modules() -> dict[str, ModuleType]:
    modules = {
        i.name: importlib.import_module(f"{drafters.__name__}.{i.name}")
        for i in pkgutil.iter_modules(drafters.__path__)
    }
    return {name: module for name, module in modules.items() if "examples" in vars(module)}


DRAFTERS = _modules()


def examples(file: str, target: LM) -> dict[str, Drafter]:
    """The configured instances of one drafter's file, new at every call."""
    return DRAFTERS[file].examples(target)
