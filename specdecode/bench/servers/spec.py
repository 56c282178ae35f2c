"""The table `server` of an arm: how to reach or start a serving engine."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import SplitResult, urlsplit

from specdecode.bench.servers.engines import ENGINES
from specdecode.support.checked import shown
from specdecode.support.kinds import FLAG, NUMBER, STRING, STRINGS, TABLE, is_of

_PLACEHOLDERS = ("target", "draft", "port")
"""The names that a command may have in braces."""

# Braces around other text may belong to an option, which is often JSON.
_PLACEHOLDER = re.compile(r"\{(\w+)\}")

_PROMPTS = ("ids", "text")


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to reach or start a server. A server has either a `url` or a `command`.

    Attributes:
        url: address of a running server, with or without "/v1" at the end.
        command: command that starts a server. {target}, {draft} and {port} stand for the models of the session and a
            free port.
        model: name of the model in requests; the server's only model if None.
        ready: path that answers as soon as the server is ready.
        environment: variables of the server's process, in addition to those of this process.
        start_minutes: most minutes until the server is ready.
        engine: "vllm", "sglang" or "llama.cpp"; or "openai" for any other engine. It is detected if None.
        prompt: "ids" sends token ids. "text" sends text, for servers that accept no ids and encode the text themselves.
            If such a server returns no ids, the output's text is encoded here.
        request: further keys of each request, such as {ignore_eos = true}. The engine "openai" gets only keys of the
            protocol by default, so it may stop early.
        prefix_cache: whether the server may cache earlier prompts.
        alone: whether no other server with `alone` may run at the same time, for example if memory holds only one.
        api_key: name of the environment variable with the server's key.

    Raises:
        ValueError: the keys do not go together, or a value is invalid.
    """

    url: str | None = None
    command: str | None = None
    model: str | None = None
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    start_minutes: float = 10.0
    engine: str | None = None
    prompt: str = "ids"
    request: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prefix_cache: bool = False
    alone: bool = False
    api_key: str | None = None

    def __post_init__(self) -> None:
        if (self.url is None) == (self.command is None):
            raise ValueError("server needs a url or a command, and not both")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
                raise ValueError(f"server.url is {self.url!r}: write http://HOST:PORT/v1")
            if parts.username is not None or parts.password is not None:
                raise ValueError("server.url holds a password, which run files would keep: use server.api_key")
            for key in ("ready", "environment", "start_minutes", "alone"):
                if getattr(self, key) != _DEFAULTS[key]:
                    raise ValueError(f"server.{key} is of no use with a url: the server runs already")
        else:
            _check_command(str(self.command))
        if not self.ready.startswith("/"):
            raise ValueError(f"server.ready is {self.ready!r}: write a path, such as /health")
        if not self.start_minutes > 0:
            raise ValueError(f"server.start_minutes is {self.start_minutes}: it must be above 0")
        for key, known in (("engine", tuple(ENGINES)), ("prompt", _PROMPTS)):
            value = getattr(self, key)
            if value is not None and value not in known:
                raise ValueError(f"server.{key} is {value!r}: choose from {', '.join(known)}")

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> ServerSpec:
        """Read the table.

        Raises:
            ValueError: a key is unknown, or a value is invalid.
        """
        if unknown := sorted(table.keys() - _DEFAULTS.keys()):
            raise ValueError(f"server has unknown keys: {', '.join(unknown)}; choose from {', '.join(_DEFAULTS)}")
        for key, value in table.items():
            if not is_of(_KINDS[key], value):
                raise ValueError(f"server.{key} is {shown(value)}: it must be {_KINDS[key]}")
        return cls(**table)

    def base_url(self, port: int) -> str:
        """Return the server's address without path.

        Args:
            port: port of the server, if the suite starts it.
        """
        url = f"http://127.0.0.1:{port}" if self.url is None else self.url
        return url.rstrip("/").removesuffix("/v1")

    @property
    def key(self) -> str | None:
        """The server's key, if it needs one.

        Raises:
            ValueError: the environment variable is not set.
        """
        if self.api_key is not None and self.api_key not in os.environ:
            raise ValueError(f"server.api_key names the environment variable {self.api_key}, which is not set")
        return None if self.api_key is None else os.environ[self.api_key]

    @property
    def loopback(self) -> bool:
        """Whether the server is on this machine."""
        if self.url is None:
            return True
        host = urlsplit(self.url).hostname or ""
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def _has_port(parts: SplitResult) -> bool:
    """Return whether an address names no port, or a possible one."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"server.command cannot be read: {error}") from None
    if not words:
        raise ValueError("server.command is empty")
    named = set(_PLACEHOLDER.findall(command))
    if "port" not in named:
        raise ValueError("server.command names no {port}: give the server its port as {port}")
    if unknown := sorted(named - set(_PLACEHOLDERS)):
        raise ValueError(
            f"server.command names {{{unknown[0]}}}: only {{target}}, {{draft}} and {{port}} are filled in"
        )


_DEFAULTS: dict[str, Any] = {
    entry.name: {} if entry.name in ("environment", "request") else entry.default for entry in fields(ServerSpec)
}
_KINDS = {
    **dict.fromkeys(_DEFAULTS, STRING),
    "environment": STRINGS,
    "request": TABLE,
    "start_minutes": NUMBER,
    "prefix_cache": FLAG,
    "alone": FLAG,
}
