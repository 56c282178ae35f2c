"""Predictions of a head several tokens ahead, at all places of a text at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from specdecode.heads.eagle3 import Eagle3Head


def unrolled(
    head: Eagle3Head, embedded: Float[Tensor, "b n H"], hidden_states: Float[Tensor, "b n F"], ahead: int
) -> Iterator[Float[Tensor, "b n H"]]:
    """Yield the states of a head that predicts as in drafting (training-time test, EAGLE-3, Li et al. 2025).

    The first prediction uses the target's hidden states, and each later one the head's own states. In prediction s,
    from 0, the head at token i attends to its own s states (i - s + 1 to i), and to the target's hidden states up to i
    - s. The tokens are always those of the text.

    Args:
        head: the head that predicts.
        embedded: embeddings of the tokens of b texts, from the second token on.
        hidden_states: the target's hidden states at the token before each of these.
        ahead: number of tokens that are predicted from each place.

    Yields:
        The head's states at all places, for one prediction after another.
    """
    state = head.fused(hidden_states)
    length = embedded.shape[1]
    positions = torch.arange(1, length + 1, device=embedded.device)
    keys: dict[int, list[Tensor]] = {}
    values: dict[int, list[Tensor]] = {}

    def store(new_keys: Tensor, new_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keys.setdefault(layer, []).append(new_keys)
        values.setdefault(layer, []).append(new_values)
        return torch.cat(keys[layer], 2), torch.cat(values[layer], 2)

    for step in range(ahead):
        state = head(embedded, state, positions, store, _visible(length, step, embedded.device))
        yield state
        state = pad(state[:, :-1], (0, 0, 1, 0))


def _visible(length: int, step: int, device: torch.device) -> Bool[Tensor, "n s"]:
    """Return the mask of the keys that each token attends to. The keys of all predictions so far are concatenated."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at
    return torch.cat([distance >= step, *(distance == step - earlier for earlier in range(1, step + 1))], 1)
