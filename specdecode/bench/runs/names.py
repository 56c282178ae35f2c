"""Names that files and tables share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from specdecode.support.files import slug

BASELINE = "ar"
"""Autoregressive decoding by this package: other arms are compared with it, unless a preset says otherwise."""

PEER_BASELINE = "hf-generate"
"""transformers' own autoregressive decoding, which this package's code cannot slow down."""

OWN_TYPE = "own"
"""The type of a run whose servers say nothing of it, where the command line does not either."""

FLAGS = ("tiny", "eos")
"""Options that make another experiment of a preset: its name goes on with a dot and theirs."""

MARGINS = "quality"
"""The folder of quality margins, below that of the baselines."""


def margins_file(target: str, texts: str) -> Path:
    """Where the quality margins of a target on the corpora of some texts are kept, below the folder of baselines."""
    corpora = sorted({sample.partition("@")[0].partition(":")[0] for sample in texts.split(",")})
    return Path(MARGINS) / f"{slug(target)}-{slug('-'.join(corpora))}.json"


def shared_by(processes: int, hardware: str) -> str:
    """Return the name of hardware on which so many processes share a model, each on such a device."""
    return hardware if processes == 1 else f"{hardware}-x{processes}"


def digest(tokens: Sequence[int]) -> str:
    """Return a short name for an output: equal for equal tokens."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]
