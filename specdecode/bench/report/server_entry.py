"""The preset entry of a server's arm, written as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from specdecode.bench.runs.records import RunFile


def server_entry(run: RunFile, arm: str) -> str:
    """Return the arm's entry as TOML, with its command or url. Strings of the file are quoted, as names or values.

    The key `baseline` is left out: it names another arm, which a preset may lack.
    """
    identity, options = run.header.identity, run.arms[arm].options
    lines = [f"[arms.{_key(arm)}]"]
    lines += [
        f"{_key(key)} = {_value(value)}" for key, value in options.items() if value is not None and key != "baseline"
    ]
    command = options["server"].get("command") if isinstance(options["server"], Mapping) else None
    for name, model in (("target", identity.target), ("draft", identity.draft)):
        if f"{{{name}}}" in str(command):
            lines.append(f"# {{{name}}} stands for {_value(model)}")
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    """Return a JSON value in TOML, which has no null."""
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)} = {_value(inner)}" for key, inner in value.items() if inner is not None)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(inner) for inner in value if inner is not None)}]"
    if isinstance(value, str):
        # TOML has the escapes of JSON, and needs one more, for the character DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower() if isinstance(value, bool) else repr(value)
