"""The intervals of a run that is looked at after each repeat, to decide whether to go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import count
from statistics import NormalDist

import numpy as np

from specdecode.bench.runs.statistics import TAIL

# A larger value keeps more of the tail for later looks. With 4 the first dozen intervals are about equally wide.
_LATE = 4
# Distance between the places of a computed distribution, and the farthest place, in standard deviations of a repeat.
_STEP, _FARTHEST = 0.02, 6.0
_NORMAL = NormalDist()


def tail_of_look(look: int, last: bool = False) -> float:
    """Return the tail of the interval at a look.

    At each end, all looks together miss the true value with a probability of at most `TAIL`. Look k may use the share
    4 / ((k + 3)(k + 4)) of `TAIL` (a spending function: Lan and DeMets 1983). The last look may use all the rest.

    A look includes the measurements of all earlier looks. So it seldom misses the true value if they did not. The
    probability of such a miss is computed for sums of normal values (Armitage, McPherson and Rowe 1969).

    Args:
        look: number of the look, from 1. After look k there are k times as many measurements as after the first.
        last: whether no look follows, for a reason that does not depend on the measurements: the time is spent.
    """
    while len(_tails) < look:
        _tails.append(next(_further_tails))
    one_of_many, last_one = _tails[look - 1]
    return last_one if last else one_of_many


def tail_of_arm(looks: int, of_all: Iterable[int], budget_spent: bool) -> float:
    """Return the tail of the interval of an arm that is no longer repeated.

    Args:
        looks: number of looks at the arm.
        of_all: numbers of looks at all arms, this one included.
        budget_spent: whether the time budget ended the run. If so, it ended the repeats of the arms with the most
            looks. The repeats of the other arms had ended with a clear verdict.
    """
    return tail_of_look(looks, last=budget_spent and looks == max(of_all))


def _all_tails() -> Iterator[tuple[float, float]]:
    """Yield two tails of each look: if more looks follow, and if it is the last.

    The sum of k values exceeds its boundary at look k, and at no look before, with the probability that the look may
    add. Sums below the boundary go on to the next look.
    """
    places = _STEP * np.arange(-round(_FARTHEST / _STEP), round(_FARTHEST / _STEP) + 1)
    repeat = np.exp(-(places**2) / 2)
    repeat /= repeat.sum()
    sums, lowest = np.ones(1), 0.0  # probabilities of the sums that no boundary stopped, and the lowest sum
    for look in count(1):
        sums, lowest = np.convolve(sums, repeat), lowest - _FARTHEST
        too_low = max(0, math.floor((-_FARTHEST * math.sqrt(look) - lowest) / _STEP))
        sums, lowest = sums[too_low:], lowest + too_low * _STEP
        at_least = np.cumsum(sums[::-1])[::-1]
        left = TAIL * _LATE / (look + _LATE - 1)
        boundary, last = (int(np.sum(at_least > added)) for added in (left / (look + _LATE), left))
        yield _tail_above(lowest + (boundary - 0.5) * _STEP, look), _tail_above(lowest + (last - 0.5) * _STEP, look)
        sums = sums[:boundary]


def _tail_above(place: float, look: int) -> float:
    """Return the probability that the sum of a look's values is above a place."""
    return 1 - _NORMAL.cdf(place / math.sqrt(look))


_further_tails = _all_tails()
_tails: list[tuple[float, float]] = []
