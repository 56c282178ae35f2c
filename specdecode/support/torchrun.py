"""The processes that `torchrun` starts to decode together."""

from __future__ import annotations

import os


def rank() -> int:
    """Return the number of this process among all processes; 0 without `torchrun`. Only process 0 reports."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among the processes on its machine; 0 without `torchrun`."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes(tp: str | None) -> int:
    """Return the number of processes among which a model's weights are split; 1 without splitting.

    Args:
        tp: "auto" for all processes of `torchrun`; None for one process.

    Raises:
        ValueError: another value, or `torchrun` did not start this process.
    """
    if tp is None:
        return 1
    if tp != "auto":
        raise ValueError(f"tp is {tp!r}: 'auto' splits the weights among all processes of torchrun")
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "tp='auto' splits the weights among the processes of torchrun, and it did not start this one: run"
            " torchrun --nproc-per-node 2 YOUR_SCRIPT"
        )
    return int(os.environ["WORLD_SIZE"])
