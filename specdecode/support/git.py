"""Ask git."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def git(*arguments: str, root: Path = Path()) -> str:
    """What git prints.

    Raises:
        ValueError: git fails, or is not there; its own last line.
    """
    program = shutil.which("git")
    if program is None:
        raise ValueError("git is not installed")
    # Names as they are, not as they would be typed.
    command = [program, "-c", "core.quotePath=false", *arguments]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["git fails"])[-1])
    return done.stdout
