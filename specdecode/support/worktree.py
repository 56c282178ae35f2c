"""Another commit of a repository beside the working tree: its files, and a Python that imports them."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specdecode.support.git import git


@contextmanager
def worktree(root: Path, ref: str) -> Iterator[Path]:
    """Check out another commit in a temporary folder, and remove it after the block, also if SIGTERM ends the process.

    Args:
        root: a folder of the repository.
        ref: the commit.

    Yields:
        The folder that corresponds to `root` in the other commit.

    Raises:
        ValueError: no such commit, or no repository.
    """
    with _interruptible(), tempfile.TemporaryDirectory(prefix="specdecode-") as scratch:
        folder = Path(scratch) / "against"
        try:
            try:
                below = git("rev-parse", "--show-prefix", root=root).strip()
                git("worktree", "add", "--detach", str(folder), ref, root=root)
            except ValueError as error:
                raise ValueError(f"{ref} cannot be checked out: {error}") from None
            yield folder / below
        finally:
            with suppress(ValueError):  # there is no checkout, or it was removed
                # --force twice: git locks a checkout until it is complete, and an interrupt may come before that.
                git("worktree", "remove", "--force", "--force", str(folder), root=root)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within this context SIGTERM raises KeyboardInterrupt, as Ctrl-C does. CI cancels jobs by SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def import_environment(folder: Path) -> dict[str, str]:
    """Return environment variables with which a process imports packages from a folder, and from its `src`."""
    sources = [str(source) for source in (folder, folder / "src") if source.is_dir()]
    paths = [*sources, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
