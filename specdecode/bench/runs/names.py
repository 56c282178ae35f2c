"""Names that files and tables share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from specdecode.support.files import fitting, slug

BASELINE = "ar"
"""The arm of autoregressive decoding by this package: the reference arm, unless a preset names another."""

PEER_BASELINE = "hf-generate"
"""The arm of transformers' own autoregressive decoding. This package's code cannot slow it down."""

OWN_TYPE = "own"
"""The data type of a run of servers, if the command line does not name it."""

FLAGS = ("tiny", "eos")
"""Options that turn a preset into another experiment. Its name then ends with a dot and the option's name."""

MARGINS = "quality"
"""The folder of quality margins, below the folder of baselines."""

ANY_HARDWARE = "any"
"""The name of the hardware in a baseline of counters, by which no times are judged."""


def margins_file(target: str, texts: str) -> Path:
    """Return the file of a target's quality margins on the corpora of some texts, below the folder of baselines."""
    corpora = sorted({sample.partition("@")[0].partition(":")[0] for sample in texts.split(",")})
    return Path(MARGINS) / fitting(f"{slug(target)}-{slug('-'.join(corpora))}.json")


def shared_by(processes: int, hardware: str) -> str:
    """Return the name of hardware whose processes, one on each device, share a model."""
    return hardware if processes == 1 else f"{hardware}-x{processes}"


def digest(tokens: Sequence[int]) -> str:
    """Return a short digest of an output: equal for equal tokens."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]
