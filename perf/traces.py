"""Record the speed of decoding on this machine over time: `python -m perf.traces FILE.npz --minutes 5`."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perf.neighbour import neighbour
from specdecode.support.disturbance import watch

TOKENS = 4
"""Tokens in a stretch of plain decoding. The time of each stretch is one entry of a trace."""

_LENGTH = 320  # new tokens of each text: enough that the first stretch, which includes the prompt, is a small part


@dataclass(frozen=True, slots=True)
class Trace:
    """The speed of a machine over time, and the share of other work on it.

    Attributes:
        seconds: seconds of each stretch of equal work, over the median of such stretches.
        taken: share of the processors' time that other work used during each stretch (`support.disturbance`).
        unit_s: median seconds of a stretch.
        about: the processor, and the other programs during the recording.
    """

    seconds: np.ndarray
    taken: np.ndarray
    unit_s: float
    about: str

    @classmethod
    def read(cls, file: Path) -> Trace:
        """Read a trace from a file of `write`."""
        with np.load(file) as arrays:
            return cls(
                arrays["seconds"].astype(float),
                arrays["taken"].astype(float),
                float(arrays["unit_s"]),
                str(arrays["about"]),
            )

    def write(self, file: Path) -> None:
        """Write the trace to a file of some kilobytes."""
        short = {name: getattr(self, name).astype(np.float16) for name in ("seconds", "taken")}
        np.savez_compressed(file, **short, unit_s=self.unit_s, about=self.about)


def record(minutes: float, about: str) -> Trace:
    """Decode with the embedded model for some minutes, and time every `TOKENS` tokens."""
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
    typical = np.median(seconds, axis=0)  # a median for each place, as longer contexts take longer
    return Trace((seconds / typical).ravel(), taken.ravel(), float(np.median(typical)), f"{cpu_name()}, {about}")


class _Notes:
    """The seconds and the shares of other work in the stretches of a text. The first stretch includes the prompt."""

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
    """Record a trace, and write it to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="file to write, .npz")
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes to record [5]")
    parser.add_argument("--neighbour", action="store_true", help="another process uses a core a fifth of the time")
    options = parser.parse_args()
    with neighbour(options.neighbour):
        trace = record(options.minutes, "a neighbour on one core a fifth of the time" if options.neighbour else "quiet")
    trace.write(options.file)


if __name__ == "__main__":
    main()
