"""Notes on standard error, beside the output."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

_SLOW_S = 1.0
"""Seconds after which a user wonders whether anything happens."""


def hub_noted(name: str) -> AbstractContextManager[None]:
    """Write a note if the block, which loads files by their id on the hub, takes longer than a second.

    Without it, a hub that does not answer means up to a minute of silence: its client asks again several times.
    """
    from huggingface_hub import constants  # only here: most commands need no hub

    if constants.HF_HUB_OFFLINE:
        return nullcontext()
    return noted_if_slow(
        f"loading {name} from the hub or a cache of its files: a hub that does not answer is asked again for up to a"
        " minute; with HF_HUB_OFFLINE=1 it is not asked"
    )


@contextmanager
def noted_if_slow(text: str) -> Iterator[None]:
    """Write a note if the block takes longer than a second."""
    timer = threading.Timer(_SLOW_S, note, [text])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def note(text: str) -> None:
    """Write a line to standard error. A line that cannot be written is dropped."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
