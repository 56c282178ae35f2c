"""The full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdecode.slots import Slots


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Nothing is ever evicted."""

    interval: int = 0

    def keep(self, slots: Slots) -> Sequence[int]:
        return range(slots.length)


def examples() -> dict[str, KeepAll]:
    return {"keep-all": KeepAll()}
