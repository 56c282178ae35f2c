"""Names that files and tables share."""

from __future__ import annotations

import re

BASELINE = "ar"
"""The arm that all others are compared with: autoregressive decoding by this package."""

PEER_BASELINE = "hf-generate"
"""transformers' own autoregressive decoding, which this package's code cannot slow down."""

FLAGS = ("tiny", "eos")
"""Options that make another experiment of a preset: its name goes on with a dot and theirs."""


def slug(text: str) -> str:
    """The text as a file name: lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
