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


def hardware_name(device: str, processes: int = 1, devices: int = 1, draft_device: str = "") -> str:
    """Return the name of the hardware of a run.

    Args:
        device: the name of one device.
        processes: number of processes, one on each device, that share the target's weights.
        devices: number of devices over which the target's layers are spread.
        draft_device: the device of the draft, if it is not the target's.
    """
    shared = f"-x{processes}" if processes > 1 else ""
    spread = f"-layers-x{devices}" if devices > 1 else ""
    apart = f"-draft-on-{slug(draft_device)}" if draft_device else ""
    return f"{device}{shared}{spread}{apart}"


def digest(tokens: Sequence[int]) -> str:
    """Return a short digest of an output: equal for equal tokens."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]
