"""What a cache policy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdecode.slots import Slots


class CachePolicy(Protocol):
    """Chooses the slots that stay.

    Attributes:
        interval: it may evict only when the committed length is a multiple of this; 0 means never. Steps are cut at
            these boundaries, so that the tokens do not depend on how the drafts fell.
    """

    @property
    def interval(self) -> int: ...

    def keep(self, slots: Slots) -> Sequence[int]:
        """The filled slots that stay, ascending."""
        ...
