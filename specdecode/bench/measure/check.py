"""Whether an output is the expected one, left it at a tie, or is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll

Check = Literal["equal", "tie", "bug"]

# Widths of verification whose rounding is looked at where an output leaves the baseline's.
_VERIFIED_ROWS = (2, 6, 16)


@torch.inference_mode()
def classify(
    target: LM,
    prompt: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    policy: CachePolicy = KeepAll(),
) -> Check:
    """Whether an output is the expected one; if not, whether the target was undecided where they part.

    Kernels for one row and for several round differently, and what differs stays in the cache. The difference that this
    makes to the logits is measured at the very place, by reading the text there token by token and in wider pieces: a
    choice between two tokens that lie closer than it is a tie, all else is a bug.
    """
    if list(expected) == list(got):
        return "equal"
    parted = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if parted is None:
        return "bug"  # not the asked length
    *text, root = [*prompt, *expected[:parted]]

    def logits(rows: int) -> torch.Tensor:
        slots = target.new_slots(len(text) + rows)
        start = max(len(prompt) - rows, 0)
        pieces = [text[:start], *(text[place : place + rows] for place in range(start, len(text), rows))]
        with target.recording_for(policy):
            for piece in filter(None, pieces):
                target.read(slots, piece, policy)
            target.evict(slots, policy)
            # Behind the root stand rejected proposals, whichever.
            return target.forward(slots, torch.tensor([root] + [0] * (rows - 1)), rows=rows)[0].double()

    one = logits(1)
    noise = max((one - logits(rows)).abs().max().item() for rows in _VERIFIED_ROWS)
    margin = abs(one[expected[parted]] - one[got[parted]]).item()
    return "tie" if margin <= 2 * noise else "bug"
