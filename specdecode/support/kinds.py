"""Kinds of values in TOML and JSON tables: their names in words, and tests of values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from specdecode.support.checked import shown

STRING, WHOLE, NUMBER, WHOLES = "a string", "a whole number", "a number", "a list of whole numbers"
NUMBERS, NAMES, COUNTS = "a list of numbers", "a list of strings", "a table of whole numbers"
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
    NUMBERS: lambda value: isinstance(value, list | tuple) and all(is_of(NUMBER, part) for part in value),
    NAMES: lambda value: isinstance(value, list | tuple) and all(is_of(STRING, part) for part in value),
    COUNTS: lambda value: isinstance(value, Mapping) and all(is_of(WHOLE, part) for part in value.values()),
}


def is_of(kind: str, value: object) -> bool:
    """Return whether a value is of a kind, which is one of the names above."""
    return _IS_OF_KIND[kind](value)


def check_table(where: str, table: Mapping[str, Any], kinds: Mapping[str, str], required: Collection[str] = ()) -> None:
    """Check the keys of a table, and the kinds of its values.

    Args:
        where: name of the table, for messages.
        table: keys and values, as read from a file.
        kinds: the kind of each key's value, by key.
        required: the keys that must be there.

    Raises:
        ValueError: a key is unknown or lacking, or a value is of another kind.
    """
    if unknown := sorted(table.keys() - kinds.keys()):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}; choose from {', '.join(kinds)}")
    if lacking := [key for key in required if key not in table]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    for key, value in table.items():
        if not is_of(kinds[key], value):
            raise ValueError(f"{where}: {key} is {shown(value)}: it must be {kinds[key]}")
