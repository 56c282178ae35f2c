"""The loss of a head: cross-entropies of several tokens ahead, predicted as in drafting."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.unrolled import unrolled
from specdecode.training.shards import Shard


def predict_ahead(
    head: Eagle3Head,
    embedding: nn.Module,
    rows: Float[Tensor, "D H"],
    place: Int[Tensor, " V"],
    batch: Shard,
    ahead: int,
) -> tuple[Float[Tensor, " ahead"], Float[Tensor, " ahead"], Float[Tensor, " ahead"]]:
    """Let a head predict tokens as in drafting, and compute its loss; see `unrolled`.

    Args:
        head: the head.
        embedding: embedding of the target.
        rows: rows of the target's output embedding, for the head's tokens.
        place: index of each token of the vocabulary among the head's tokens; -1 for all others.
        batch: texts with the target's hidden states and distributions.
        ahead: number of tokens predicted from each place.

    Returns:
        Three numbers for each token ahead: the number of predictions; the sum of their cross-entropies, in nats,
        against the target's distribution over the head's tokens; and the number of predictions whose most probable
        token is the target's.
    """
    embedded = embedding(batch.tokens[:, 1:]).to(rows.dtype)
    hidden_states = batch.hidden_states[:, :-1].to(rows.dtype)
    wanted = place[batch.top[:, 1:]]
    probs = batch.probs[:, 1:].where(wanted >= 0, 0.0)
    positions = torch.arange(1, embedded.shape[1] + 1, device=embedded.device)
    counts, losses, agreed = [], [], []
    for step, state in enumerate(unrolled(head, embedded, hidden_states, ahead)):
        logits = head.logits(state, rows).to(rows.dtype)
        # The first tokens of a text have too few tokens before them for a prediction so far ahead.
        counted = (positions > step).expand(wanted.shape[:2])
        entropy: Tensor = CrossEntropy.apply(logits, wanted, probs)  # type: ignore[no-untyped-call]
        counts.append(counted.sum().double())
        losses.append(entropy.where(counted, 0.0).sum().double())
        # Finding the largest value takes a fraction of the time of finding its index.
        detached = logits.detach()
        target_best = detached.gather(-1, wanted[..., :1].clamp_min(0))[..., 0]
        agrees = (target_best == detached.amax(-1)) & (wanted[..., 0] >= 0)
        agreed.append((agrees & counted).sum().double())
    return torch.stack(counts), torch.stack(losses), torch.stack(agreed)


class CrossEntropy(torch.autograd.Function):
    """The cross-entropy of distributions [..., D], given by logits, against the probabilities [..., k] of a few tokens
    (-1 for none). The derivative differs from the distribution only at these tokens, so one pass over D is enough.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, probs: Tensor) -> Tensor:
        chosen = wanted.clamp_min(0)
        total = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, total, chosen, probs)
        entropy: Tensor = (probs * (total - logits.gather(-1, chosen))).sum(-1)
        return entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, total, chosen, probs = ctx.saved_tensors
        weights = gradient[..., None] * probs
        slope = (logits - total).exp_().mul_(weights.sum(-1, keepdim=True)).scatter_add_(-1, chosen, -weights)
        return slope, None, None
