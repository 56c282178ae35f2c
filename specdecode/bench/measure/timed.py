"""Timed runs of an arm, undisturbed by this process's own work."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from specdecode.backends.compiled import preparations
from specdecode.backends.graph import MOST_CAPTURING_RUNS
from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import ArmError
from specdecode.bench.arms.run import Run

T = TypeVar("T")


def timed(arm: Arm, prompt: Sequence[int], length: int, expected: Sequence[int]) -> Run:
    """Return one timed run of an arm; see `timed_by`.

    Raises:
        ArmError: an arm from code or of a server does not decode, or its output is empty.
    """
    run, captured = timed_by(lambda: arm.run(prompt, length, expected))
    if not run.tokens:  # a server that does not go on after a stop token may write nothing before it
        raise ArmError(f"arm {arm.name!r}: its output is empty")
    return replace(run, captured=captured)


def timed_by(once: Callable[[], T]) -> tuple[T, bool]:
    """Return the result of a timed run, with garbage collected before it and not during it. Also return whether it
    captured CUDA graphs or compiled.

    Such a run is repeated, as the next run need not; the last of `MOST_CAPTURING_RUNS` is returned all the same. The
    next collection skips all objects that are in use now, until `gc.unfreeze`: it takes a tenth of a second or more for
    those of PyTorch alone.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(MOST_CAPTURING_RUNS):
            before = preparations()
            result = once()
            captured = preparations() > before
            if not captured:
                break
        return result, captured
    finally:
        gc.enable()
