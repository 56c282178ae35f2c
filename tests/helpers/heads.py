"""Folders of draft heads, for what loads them by name."""

from __future__ import annotations

from pathlib import Path

from specdecode import LM
from specdecode.heads.bound import output_rows, target_fingerprint, untrained
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import write_eagle3


def write_head(target: LM, folder: Path, head: Eagle3Head | None = None, *, shared_output: bool = False) -> Path:
    """Write a head, by default one of random weights; return its folder."""
    head = head or untrained(target)
    rows = None if shared_output else output_rows(target, head.tokens)
    folder = folder / "head"
    write_eagle3(
        folder, head, rows, target_fingerprint(target), [type(target.model).__name__], {"seed": 7}, "# A head\n"
    )
    return folder
