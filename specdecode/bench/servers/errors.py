"""The errors of servers."""

from __future__ import annotations


class ServerError(Exception):
    """A server failed; the text is one sentence in which "it" is the arm."""
