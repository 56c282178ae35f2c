"""Progress of long work, on a terminal or in a log."""

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
    """A function to call with (done, total, what is going on): a bar on a terminal, else a line now and then."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _log(unit)
        return
    columns = (
        TextColumn("{task.description}"),
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
    told = 0.0
    # Of this work: what went before, or was there already, does not tell how long the rest takes.
    whole, begun, since = 0, 0, started

    def tell(done: int, total: int, doing: str) -> None:
        nonlocal told, whole, begun, since
        now = time.monotonic()
        if total != whole:
            whole, begun, since = total, done, now
        if now - told < _LOG_INTERVAL_S and done < total:
            return
        told = now
        left = f"{(now - since) / (done - begun) * (total - done):.0f} s left" if done > begun else "starting"
        # A log that takes no more, as on a full disk, does not end the work.
        with suppress(OSError):
            sys.stderr.write(f"{done}/{total} {unit}, {now - started:.0f} s, {left}: {doing}\n")

    return tell
