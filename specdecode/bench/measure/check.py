"""Check of outputs: equal to the expected output, different because of a tie, or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from specdecode.bench.arms.arm import Arm
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy
from specdecode.policies.keep_all import KeepAll

Check = Literal["equal", "tie", "bug"]

# Rows of the verifying forwards whose rounding is measured where an output differs from the reference arm's.
_VERIFIED_ROWS = (2, 6, 16)


def check(arm: Arm, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int], baseline: Arm) -> Check:
    """Check an arm's output against its reference arm's.

    Without a loaded model and without log-probabilities from servers, a tie cannot be distinguished from a wrong token:
    both are "bug". On the backend "exact" there are no ties, unless the policy reads attention: then all rows attend
    together.
    """
    requests, those = (1 if one.server is None else one.server.requests for one in (arm, baseline))
    if requests != those:
        # A server may decode several prompts in a run; the first output is the prompt's own.
        shared = min(len(expected), len(got))
        expected, got = expected[:shared], got[:shared]
    if arm.unchecked or list(expected) == list(got):
        return "equal"
    if arm.server is not None and baseline.server is not None:
        return arm.server.classify(baseline.server, prompt, expected, got)
    if arm.target is None:
        return "bug"
    if arm.target.backend.exact and arm.target is baseline.target and not arm.policy.reads_attention:
        return "bug"
    return classify(arm.target, prompt, expected, got, arm.policy)


@torch.inference_mode()
def classify(
    target: LM,
    prompt: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    policy: CachePolicy = KeepAll(),
) -> Check:
    """Classify an output: "equal" to the expected one, different because of a "tie", or wrong, a "bug".

    Kernels for one row and for several rows round differently, and the difference stays in the cache. This noise in the
    logits is measured at the first differing token: the text is read token by token, and in wider pieces. The outputs
    differ by a tie if the logits of the two tokens are at most twice the noise apart. All else is a bug.
    """
    if list(expected) == list(got):
        return "equal"
    parted = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if parted is None:
        return "bug"  # one output is a prefix of the other: wrong length
    if not all(0 <= token < target.vocab_size for token in (*expected[: parted + 1], got[parted])):
        return "bug"  # code or a server may write an id that is no token of the target
    *text, root = [*prompt, *expected[:parted]]
    room = target.context_length if policy.interval else target.context_length - len(text)

    def logits(rows: int) -> torch.Tensor:
        rows = min(rows, room)
        slots = target.new_slots(len(text) + rows)
        start = max(len(prompt) - rows, 0)
        pieces = [text[:start], *(text[place : place + rows] for place in range(start, len(text), rows))]
        with target.recording_for(policy):
            for piece in filter(None, pieces):
                target.read(slots, piece, policy)
            target.evict(slots, policy)
            # The rows after the root stand for rejected proposals. Their tokens do not matter.
            return target.forward(slots, torch.tensor([root] + [0] * (rows - 1)), rows=rows)[0].double()

    one = logits(1)
    noise = max((one - logits(rows)).abs().max().item() for rows in _VERIFIED_ROWS)
    margin = abs(one[expected[parted]] - one[got[parted]]).item()
    return "tie" if margin <= 2 * noise else "bug"
