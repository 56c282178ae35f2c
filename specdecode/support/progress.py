"""Show the progress of long work, on a terminal or in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LOG_INTERVAL_S = 15.0


@contextmanager
def progress(unit: str = "runs") -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on a terminal, and a line from time to time elsewhere.

    Args:
        unit: name of the counted units, in the plural.

    Yields:
        A function to call with the number of finished units, the number of all units, and a name of the current work.
    """
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _log(unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(unit)

        def tell(done: int, total: int, doing: str) -> None:
            bar.update(task, completed=done, total=total, description=doing)

        yield tell


def _log(unit: str) -> Callable[[int, int, str], None]:
    started = time.monotonic()
    written = 0.0
    # Estimate the remaining time from the work since `begun`: a resumed session skips finished units at once.
    last_total, begun, begun_at = 0, 0, started

    def tell(done: int, total: int, doing: str) -> None:
        nonlocal written, last_total, begun, begun_at
        now = time.monotonic()
        if total != last_total:
            last_total, begun, begun_at = total, done, now
        if now - written < _LOG_INTERVAL_S and done < total:
            return
        written = now
        left = f"{(now - begun_at) / (done - begun) * (total - done):.0f} s left" if done > begun else "starting"
        # A log that cannot be written, for example on a full disk, must not end the work.
        with suppress(OSError):
            sys.stderr.write(f"{done}/{total} {unit}, {now - started:.0f} s, {left}: {doing}\n")

    return tell
