"""Read values from files that may be cut off, edited by hand, or foreign. Each value is checked when it is read.

Every function raises ValueError with the name of the value, the value, and its fault.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdecode.support.files import is_device

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST = 1e15
"""Bound of counts, bytes and seconds. Sums and ratios of numbers within this bound stay finite."""

LEAST_SECONDS = 1e-9
"""The shortest time that a clock resolves."""

MOST_NATS = 700.0
"""Bound of a mean loss per token, in nats. Its exponential, the perplexity, stays finite."""

_SHOWN_CHARACTERS = 60


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark. It is read more than once, so no pipe will do."""
    try:
        if is_device(path):
            raise ValueError(f"{path} is a pipe or a device: name a file")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} cannot be read: it is no text in UTF-8") from None


def parse_json(text: str, path: Path) -> Any:
    """Parse the JSON text of a file; the message names the path."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is no JSON, from line {error.lineno} on") from None
    # The parser's stack is too small for objects nested thousands of levels deep, and numbers may be too long.
    except (ValueError, RecursionError):
        raise ValueError(f"{path} cannot be read: it is no JSON that this package writes") from None


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parse a text in TOML; the message says what it is by its name."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None


def mapping(value: Any, name: str) -> dict[str, Any]:
    """Return a value that must be a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, which is no object of names and values")
    return value


def items(value: Any, name: str) -> list[Any]:
    """Return a value that must be a list."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {shown(value)}, which is no list")
    return value


def number(values: Any, name: Any, least: float = -MOST, most: float = MOST) -> float:
    """Return an entry of an object or a list that must be a finite number within bounds."""
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{name} is {shown(value)}, which is no number")
    if not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, which is out of range: it is from {least:g} to {most:g}")
    return value


def count(values: Any, name: Any, least: int = 0) -> int:
    """Return an entry that must be a whole number."""
    value = number(values, name, least)
    if value != int(value):
        raise ValueError(f"{name} is {shown(values[name])}, which is no whole number")
    return int(value)


def numbers(value: Any, name: str, least: float = -MOST, most: float = MOST) -> list[float]:
    """Return a value that must be a list of numbers."""
    return [number({name: entry}, name, least, most) for entry in items(value, name)]


def counts(value: Any, name: str) -> list[int]:
    """Return a value that must be a list of whole numbers."""
    return [count({name: entry}, name) for entry in items(value, name)]


def texts(value: Any, name: str) -> list[str]:
    """Return a value that must be a list of texts."""
    return [text({name: entry}, name) for entry in items(value, name)]


def flag(values: Mapping[str, Any], name: str, default: bool | None = None) -> bool:
    """Return an entry that must be true or false; the default where an older file lacks the entry."""
    value = values[name] if default is None else values.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, which is neither true nor false")
    return value


def text(values: Mapping[str, Any], name: str) -> str:
    """Return an entry that must be a text."""
    value = values[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}, which is no text")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return parse_json(read_text(path), path)


def shown(value: Any) -> str:
    """Return a value as text for a message, cut if it is long."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # Python refuses to print integers of thousands of digits
        return "too long to show"
    return written if len(written) <= _SHOWN_CHARACTERS else f"{written[:_SHOWN_CHARACTERS]}..."
