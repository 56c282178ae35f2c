"""Perplexity through the decode path: the forwards, slots and masks that decoding uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from specdecode.lm import LM
from specdecode.tree import DraftTree


@torch.inference_mode()
def negative_log_likelihoods(lm: LM, tokens: Sequence[int], width: int) -> Float[Tensor, " m"]:
    """-log p of each token after the first, in nats, teacher-forced in steps like those of decoding.

    Every step is a tree over the slots: the true tokens as one path, and beside each a wrong sibling, as a drafter
    would propose; the path is accepted. A prefill, which does not read the cache, would not show what is wrong there.

    Args:
        lm: the model.
        tokens: the text.
        width: true tokens in a step; 1 is autoregressive decoding.
    """
    slots = lm.new_slots(len(tokens) + 2 * width)
    losses: list[Tensor] = []
    for start in range(0, len(tokens) - 1, width):
        known = tokens[start + 1 : start + width]
        nodes = [node for token in known for node in ((token + 1) % lm.vocab_size, token)]
        # Node 2i is the true token of depth i, node 2i - 1 its sibling; both follow the true token before them.
        parents = [2 * (i // 2) for i in range(len(nodes))]
        root = slots.length
        logits = lm.forward_tree(
            slots,
            tokens[start : start + 1],
            DraftTree(torch.tensor(nodes, dtype=torch.long), torch.tensor(parents, dtype=torch.long)),
        )
        slots.keep([root + 2 * (i + 1) for i in range(len(known))], after=root + 1)
        wanted = torch.tensor(tokens[start + 1 : start + 1 + width], device=logits.device)
        losses.append(torch.nn.functional.cross_entropy(logits[::2][: len(wanted)].double(), wanted, reduction="none"))
    return torch.cat(losses)


def perplexity(losses: Sequence[Float[Tensor, " n"]]) -> float:
    """exp(sum of NLL / number of tokens) over a corpus, from the losses of its documents."""
    every = torch.cat(list(losses))
    return math.exp(every.mean().item())
