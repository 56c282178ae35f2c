"""Kinds of values in TOML and JSON tables: their names in words, and tests of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

STRING, WHOLE, NUMBER, WHOLES = "a string", "a whole number", "a number", "a list of whole numbers"
OPTIONS, TABLE, STRINGS, FLAG = "a table of options", "a table", "a table of strings", "true or false"

_IS_OF_KIND: dict[str, Callable[[Any], bool]] = {
    STRING: lambda value: isinstance(value, str),
    WHOLE: lambda value: isinstance(value, int) and not isinstance(value, bool),
    NUMBER: lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    OPTIONS: lambda value: isinstance(value, dict),
    TABLE: lambda value: isinstance(value, Mapping),
    STRINGS: lambda value: isinstance(value, Mapping) and all(isinstance(part, str) for part in value.values()),
    FLAG: lambda value: isinstance(value, bool),
    WHOLES: lambda value: isinstance(value, list | tuple) and all(is_of(WHOLE, part) for part in value),
}


def is_of(kind: str, value: object) -> bool:
    """Return whether a value is of a kind, which is one of the names above."""
    return _IS_OF_KIND[kind](value)
