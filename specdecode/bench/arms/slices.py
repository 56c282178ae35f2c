"""Runs in slices: between two slices the process waits, so that another process can run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from specdecode.backends.device import synchronise
from specdecode.backends.graph import clock
from specdecode.support.call_stack import with_stack_room


class Slices:
    """The slices of a run. Arms call `end_step` after each step.

    The first slice ends with the first step, which reads the prompt. Each further slice has the same number of steps;
    the last one may have fewer.

    Args:
        steps: steps in a slice.
        wait: returns when this process may continue.

    Attributes:
        current: the slices of the run in this process; None if it runs without a pause.
        waited_s: seconds of all waits of this process so far, without captures of CUDA graphs.
        seconds: seconds of each finished slice.
        tokens: number of tokens of the finished steps, as far as the arm counts them.
    """

    current: ClassVar[Slices | None] = None
    waited_s: ClassVar[float] = 0.0

    def __init__(self, steps: int, wait: Callable[[], None]) -> None:
        self._steps, self._wait = steps, wait
        self.begin(torch.device("cpu"))

    def begin(self, device: torch.device) -> None:
        """Begin the first slice of a run on a device."""
        self.seconds: list[float] = []
        self.tokens = 0
        self._device, self._left, self._started = device, 1, own_s()
        self._waits: list[tuple[float, float]] = []

    def end_step(self, tokens: int) -> None:
        """Count a step and its tokens. If it is the last step of the slice, end the slice, and wait."""
        self.tokens += tokens
        self._left -= 1
        if self._left:
            return
        self.end()
        before, began = time.perf_counter(), clock()
        with _stopped_timer():
            self._wait()
        after = time.perf_counter()
        Slices.waited_s += clock() - began
        self._waits.append((after, after - before))
        self._left, self._started = self._steps, own_s()

    def end(self) -> None:
        """End the slice."""
        synchronise(self._device)
        self.seconds.append(own_s() - self._started)

    def waited_before(self, moment: float) -> float:
        """Return the seconds of this run's waits that ended before a moment of `time.perf_counter`."""
        return sum(seconds for end, seconds in self._waits if end <= moment)


@contextmanager
def sliced(steps: int, wait: Callable[[], None]) -> Iterator[Slices]:
    """Run in slices within this context. The arguments are those of `Slices`."""
    Slices.current = slices = Slices(steps, wait)
    try:
        yield slices
    finally:
        Slices.current = None


def own_s() -> float:
    """Return the seconds on this process's clock, without waits between slices and without captures of CUDA graphs."""
    return clock() - Slices.waited_s


def end_step(tokens: Sized) -> None:
    """Tell the slices of the run, if there are any, that a step with these tokens has ended."""
    if Slices.current is not None:
        Slices.current.end_step(len(tokens))


def timed_call(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """Call, and return the result and the seconds by `own_s`. The device is synchronised before and after."""
    call = with_stack_room(call)
    synchronise(device)
    if Slices.current is not None:
        Slices.current.begin(device)
    started = own_s()
    result = call()
    synchronise(device)
    seconds = own_s() - started
    if Slices.current is not None:
        Slices.current.end()
    return result, seconds


@contextmanager
def _stopped_timer() -> Iterator[None]:
    """Stop the timer of this process, such as that of an arm's time limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left = signal.setitimer(signal.ITIMER_REAL, 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
