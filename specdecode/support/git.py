"""Run git."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SETTINGS = (
    "core.quotePath=false",  # no quotes around file names with special characters
    "diff.relative=false",  # paths from the top of the repository, also in a folder of it
    "log.showSignature=false",  # no lines of GnuPG among those of the log
)
"""Settings of git that parsed output depends on, in place of the user's."""


def git(*arguments: str, root: Path = Path()) -> str:
    """Return the standard output of a git command.

    Raises:
        ValueError: git fails, with the reason from its error output, or git is not installed.
    """
    program = shutil.which("git")
    if program is None:
        raise ValueError("git is not installed")
    settings = (part for setting in _SETTINGS for part in ("-c", setting))
    command = [program, *settings, *arguments]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["git fails"]
        # Below the reason git may write advice.
        raise ValueError(next((line for line in lines if line.startswith("fatal:")), lines[-1]))
    return done.stdout


def commit_id(ref: str, root: Path = Path()) -> str:
    """Return the id of the commit that a reference names.

    Raises:
        ValueError: there is no such commit, or no repository.
    """
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}", root=root).strip()
    except ValueError as error:
        raise ValueError(f"{ref}: no such commit ({error})") from None
