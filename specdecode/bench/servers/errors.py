"""What goes wrong with a server."""

from __future__ import annotations


class ServerError(Exception):
    """A server did not do what it was asked for; the text is one sentence about "it"."""
