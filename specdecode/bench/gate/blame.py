"""The part of a step that made an arm slower or faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from specdecode.bench.runs.counts import RowSeconds
from specdecode.bench.runs.records import ArmRecord

Parts = Mapping[str, Callable[[RowSeconds], float | None]]

PARTS: Parts = {
    "drafting": lambda seconds: seconds.draft,
    "verifying": lambda seconds: seconds.verify,
    "overhead": lambda seconds: seconds.overhead,
}
"""The parts of a step. Each value returns the seconds of its part."""

_WHOLE: Parts = {"time a step": lambda seconds: seconds.total}


@dataclass(frozen=True, slots=True)
class Blame:
    """A change of the time per token, split into its causes.

    Attributes:
        shares: logarithm of the factor by which each cause changed the time per token. Their sum is the whole change.
            "acceptance length": steps per token. "drafting", "verifying", "overhead": seconds of a step; "time a step"
            if its parts were not timed. "reference arm": its own speed, if known to have changed.
    """

    shares: dict[str, float]

    @property
    def main(self) -> str:
        """Return the cause with the largest change in the direction of the whole change."""
        total = sum(self.shares.values())
        return max(self.shares, key=lambda cause: math.copysign(1.0, total) * self.shares[cause])

    @property
    def changes(self) -> dict[str, float]:
        """Return the change of the time per token by each cause alone, as a share."""
        return {cause: math.expm1(share) for cause, share in self.shares.items()}

    def __str__(self) -> str:
        total = math.expm1(sum(self.shares.values()))
        # Not "-0.0%", which rounding makes of nothing.
        parts = ", ".join(f"{cause} {round(change, 3) + 0.0:+.1%}" for cause, change in self.changes.items())
        return f"time per token {total:+.1%}: {parts}; mostly {self.main}"


def blame(
    new: ArmRecord,
    old: ArmRecord,
    prompts: Collection[str],
    change: float | None = None,
    reference: float = 0.0,
) -> Blame | None:
    """Split the change of an arm's time per token into its causes; None for a peer, and for older files.

    The time per token is a sum over parts of (steps per token) x (seconds of the part per step). The logarithmic mean
    Divisia index splits the change of its logarithm. It leaves no remainder, and parts may be zero (Ang 2005, "The LMDI
    approach to decomposition analysis").

    Args:
        new, old: the arm's records in the new and in the old run.
        prompts: prompts to sum over; both records have them.
        change: new speed over old, by a statistic that pairs runs and withstands disturbed ones. The causes then add
            up to this change: the records' own seconds only say how a step is divided. None: the change of the records'
            own seconds.
        reference: logarithm of the factor by which the arm's reference arm became faster, a part of `change`.
    """
    if not prompts or new.peer or old.peer:
        return None
    parts = next(
        (parts for parts in (PARTS, _WHOLE) if all(_times(record, prompts, parts) for record in (new, old))), None
    )
    if parts is None:
        return None
    after, before = (_s_per_token(record, prompts, parts) for record in (new, old))
    if change is not None:
        scale = math.exp(-reference) / change * sum(before.values()) / sum(after.values())
        after = {part: scale * seconds for part, seconds in after.items()}
    steps = [record.counts(prompts).steps / record.counts(prompts).tokens for record in (new, old)]
    whole = _log_mean(sum(after.values()), sum(before.values()))
    fewer = math.log(steps[0] / steps[1])
    shares = {"acceptance length": 0.0}
    for part in parts:
        weight = _log_mean(after[part], before[part]) / whole
        shares["acceptance length"] += weight * fewer
        shares[part] = (after[part] - before[part]) / whole - weight * fewer
    return Blame(shares | {"reference arm": reference} if reference else shares)


def _times(record: ArmRecord, prompts: Collection[str], parts: Parts) -> bool:
    """Return whether all of these parts were timed."""
    seconds = record.seconds(prompts)
    return all(part(seconds) is not None for part in parts.values())


def _s_per_token(record: ArmRecord, prompts: Collection[str], parts: Parts) -> dict[str, float]:
    """Return the seconds per token of each part."""
    seconds, tokens = record.seconds(prompts), record.counts(prompts).tokens
    return {name: (part(seconds) or 0.0) / tokens for name, part in parts.items()}


def _log_mean(a: float, b: float) -> float:
    """Return (a - b) / (ln a - ln b), continued to a = b and to 0."""
    if a <= 0 or b <= 0:
        return 0.0
    # Not log(a / b), which loses digits if a and b are close.
    ratio = math.log1p((a - b) / b)
    return (a - b) / ratio if ratio else a
