"""Record how fast this machine decodes from moment to moment: `python -m perf.traces FILE.npz --minutes 5`."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perf.neighbour import neighbour
from specdecode.support.disturbance import watch

TOKENS = 4
"""Tokens of plain decoding whose time is one entry of a trace."""

_LENGTH = 320  # of each text: long enough that its first chunk, which carries the prompt, is a small part


@dataclass(frozen=True, slots=True)
class Trace:
    """How fast a machine was, and what others took from it.

    Attributes:
        seconds: that each stretch of equal work took, over what it takes in the median.
        taken: share of the processors' time that other work took meanwhile (`support.disturbance`).
        unit_s: what a stretch takes in the median.
        about: the processor, and what ran beside.
    """

    seconds: np.ndarray
    taken: np.ndarray
    unit_s: float
    about: str

    @classmethod
    def read(cls, file: Path) -> Trace:
        """Read a trace that `write` wrote."""
        with np.load(file) as arrays:
            return cls(
                arrays["seconds"].astype(float),
                arrays["taken"].astype(float),
                float(arrays["unit_s"]),
                str(arrays["about"]),
            )

    def write(self, file: Path) -> None:
        """Write a file of some kilobytes."""
        short = {name: getattr(self, name).astype(np.float16) for name in ("seconds", "taken")}
        np.savez_compressed(file, **short, unit_s=self.unit_s, about=self.about)


def record(minutes: float, about: str) -> Trace:
    """Decode the embedded model for some minutes, and time every few tokens."""
    from specdecode import generate, load
    from specdecode.evals.data import token_prompts
    from specdecode.models.embedded import EMBEDDED
    from specdecode.support.environment import cpu_name

    target = load(EMBEDDED)
    prompt = next(iter(token_prompts("humaneval:1", target)[0].values()))
    generate(target, prompt, max_new_tokens=_LENGTH)
    rows: list[_Notes] = []
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        rows.append(_Notes())
        generate(target, prompt, max_new_tokens=_LENGTH, on_step=rows[-1])
    seconds, taken = (np.array([getattr(row, name)[1:] for row in rows]) for name in ("seconds", "taken"))
    typical = np.median(seconds, axis=0)  # longer contexts take longer
    return Trace((seconds / typical).ravel(), taken.ravel(), float(np.median(typical)), f"{cpu_name()}, {about}")


class _Notes:
    """Note what each stretch of a text took. The first carries the prompt."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.taken: list[float] = []
        self._steps = 0
        self._begin()

    def __call__(self, tokens: list[int]) -> None:
        self._steps += 1
        if self._steps % TOKENS == 0:
            self.seconds.append(time.perf_counter() - self._started)
            self.taken.append(self._share() or 0.0)
            self._begin()

    def _begin(self) -> None:
        self._share, self._started = watch(), time.perf_counter()


def main() -> None:
    """Record a trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="to write, .npz")
    parser.add_argument("--minutes", type=float, default=5.0, help="[5]")
    parser.add_argument("--neighbour", action="store_true", help="another process takes a core a fifth of the time")
    options = parser.parse_args()
    with neighbour(options.neighbour):
        trace = record(options.minutes, "a neighbour on one core a fifth of the time" if options.neighbour else "quiet")
    trace.write(options.file)


if __name__ == "__main__":
    main()
