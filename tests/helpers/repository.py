"""Git repositories for tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.helpers.root import ROOT

_PROCESSOR_TIME = "import time\n\ntime.perf_counter = time.process_time\n"


def git(folder: Path, *arguments: str) -> str:
    """Run git under a test identity, and return its output."""
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def commit(folder: Path, message: str) -> str:
    """Commit everything in the folder, even if nothing has changed, and return the commit's short id."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return git(folder, "rev-parse", "--short", "HEAD").strip()


def package_repository(folder: Path) -> str:
    """Create a repository with this package in one commit, and return the commit's short id.

    Its workers take the processor's time for the time: what else the machine does changes no verdict on them.
    """
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if not name.startswith(("baselines/", "docs/", "specdecode/assets/")) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    edit(folder / "specdecode" / "bench" / "worker.py", "import gc\n", f"import gc\n{_PROCESSOR_TIME}")
    git(folder, "init", "--quiet")
    return commit(folder, "before")


def edit(file: Path, before: str, after: str) -> None:
    """Replace a text that stands in a file exactly once."""
    text = file.read_text()
    assert text.count(before) == 1, before
    file.write_text(text.replace(before, after))


def slow_down_verification(folder: Path, seconds: float) -> None:
    """Delay every verification in a repository of this package, by many times its own duration.

    It waits busily: the workers count the processor's time, and a sleep takes none.
    """
    commit = "        sequence.commit(tree, output, forward_started)\n"
    wait = f"        while clock() - done_at < {seconds}:\n            pass\n"
    generate = folder / "specdecode" / "decoding" / "generate.py"
    edit(generate, commit, f"        done_at = clock()\n{wait}{commit}")
