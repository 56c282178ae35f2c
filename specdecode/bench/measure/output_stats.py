"""What an output says of itself: whether it repeats itself, and how likely its own model finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from specdecode.bench.arms.run import Run
from specdecode.models.lm import LM

_NGRAM = 4
_CHUNK = 128


def repeated(tokens: Sequence[int]) -> tuple[int, int]:
    """How many 4-grams of the output stood in it before, and how many it has."""
    ngrams = [tuple(tokens[place : place + _NGRAM]) for place in range(len(tokens) - _NGRAM + 1)]
    return len(ngrams) - len(set(ngrams)), len(ngrams)


@torch.inference_mode()
def own_losses(target: LM, prompt: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, " n"] | None:
    """-log p of each new token under the target with its full cache, in nats; None where its context is too short.

    Of greedy output this is small whatever the output is worth, and the smaller the more it loops: no measure of
    quality.
    """
    text = [*prompt, *tokens]
    if len(text) > target.context_length:
        return None
    slots, losses = target.new_slots(len(text)), []
    for start in range(0, len(text) - 1, _CHUNK):
        read = torch.tensor(text[start : min(start + _CHUNK, len(text) - 1)])
        follow = torch.tensor(text[start + 1 : start + 1 + len(read)], device=target.device)
        logits = target.forward(slots, read, rows=len(read)).float()
        losses.append(nn.functional.cross_entropy(logits, follow, reduction="none").cpu())
    return torch.cat(losses)[len(prompt) - 1 :]


def told(run: Run, losses: Float[Tensor, " n"] | None) -> Run:
    """The run with counts of what its output says of itself: "ngrams" and of them "repeated", and "nll" in nats."""
    again, ngrams = repeated(run.tokens)
    counts: dict[str, float] = {**run.counts, "ngrams": ngrams, "repeated": again}
    if losses is not None:
        counts["nll"] = losses[: len(run.tokens)].sum().item()
    return replace(run, counts=counts, cuts=[told(cut, losses) for cut in run.cuts])
