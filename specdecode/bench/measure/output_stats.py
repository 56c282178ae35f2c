"""Output statistics: the repetition in an output, and its likelihood under its own model."""

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
    """Return the number of repeated 4-grams in an output, and the number of all 4-grams."""
    ngrams = [tuple(tokens[place : place + _NGRAM]) for place in range(len(tokens) - _NGRAM + 1)]
    return len(ngrams) - len(set(ngrams)), len(ngrams)


@torch.inference_mode()
def own_losses(target: LM, prompt: Sequence[int], tokens: Sequence[int]) -> Float[Tensor, " n"] | None:
    """Return -log p of each new token under the target with its full cache, in nats.

    This is no measure of quality: it is small for any greedy output, and smaller if the output loops. Return None if
    the target's context is too short, or an id of the output is no token of the target.
    """
    text = [*prompt, *tokens]
    if len(text) > target.context_length or not all(0 <= token < target.vocab_size for token in tokens):
        return None
    slots, losses = target.new_slots(len(text)), []
    for start in range(0, len(text) - 1, _CHUNK):
        read = torch.tensor(text[start : min(start + _CHUNK, len(text) - 1)])
        targets = torch.tensor(text[start + 1 : start + 1 + len(read)], device=target.device)
        logits = target.forward(slots, read, rows=len(read)).float()
        losses.append(nn.functional.cross_entropy(logits, targets, reduction="none").cpu())
    return torch.cat(losses)[len(prompt) - 1 :]


def with_output_stats(run: Run, losses: Float[Tensor, " n"] | None) -> Run:
    """Return the run with output statistics in its counts and in those of its cuts: 4-grams and the sum of losses."""
    again, ngrams = map(sum, zip(*map(repeated, run.outputs), strict=True))
    # The losses belong to a single output.
    nll = None if losses is None or len(run.outputs) > 1 else losses[: len(run.tokens)].sum().item()
    counts = replace(run.counts, ngrams=ngrams, repeated=again, nll=nll)
    return replace(run, counts=counts, cuts=[with_output_stats(cut, losses) for cut in run.cuts])
