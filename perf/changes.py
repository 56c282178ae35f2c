"""Count the changes that `specdecode history` finds in simulated series of speeds: `python -m perf.changes`."""

from __future__ import annotations

import argparse
import math

import numpy as np

from specdecode.bench.gate.changes import LEVEL, find_changes
from specdecode.cli.output import say

NOISE = 0.01
"""Standard deviation of the logarithm of a version's speed."""

_ARMS = 12  # arms of a baseline; they share the level of significance


def losses(count: int, steps: int, loss: float) -> np.ndarray:
    """Return a series of `count` log speeds that loses the share `loss` at each of `steps` versions in its middle."""
    place = np.arange(count) - (count - steps) // 2 + 1
    return math.log1p(-loss) * np.clip(place, 0, steps)


def main() -> None:
    """Print the shares of series with a false finding, and the shares with a found slowdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=300, help="series of each kind [300]")
    number = parser.parse_args().series
    chance = np.random.default_rng(0)
    say("| no change, one arm | 12 versions | 20 | 40 |\n|---|--:|--:|--:|")
    for name in ("normal noise", "outliers (Student's t, two degrees of freedom)"):
        shares = []
        for count in (12, 20, 40):
            noise = (
                chance.normal(size=count) if name == "normal noise" else chance.standard_t(2, count)
                for _ in range(number)
            )
            shares.append(sum(bool(find_changes(NOISE * series)) for series in noise) / number)
        say(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    say("\n| a slowdown in one of twelve arms | 16 versions | 24 versions |\n|---|--:|--:|")
    for steps, loss in ((1, 0.01), (1, 0.02), (1, 0.03), (1, 0.04), (8, 0.005), (8, 0.01)):
        shares = []
        for count in (16, 24):
            series = (losses(count, steps, loss) + NOISE * chance.normal(size=count) for _ in range(number))
            changes_of_arms = (find_changes(logs, LEVEL / _ARMS) for logs in series)
            shares.append(sum(any(change.slower for change in changes) for changes in changes_of_arms) / number)
        say(f"| {steps} of {loss:.1%} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
