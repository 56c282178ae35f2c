"""Let a head predict several tokens ahead at all places of a text at once."""

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
    """Yield the states of a head that predicts as it does in drafting: the first token from the target's hidden states,
    each later one from its own states after those (training-time test, EAGLE-3, Li et al. 2025).

    At token i, after s of its own states (i - s + 1 to i), the head attends to these and to the target's hidden states
    up to i - s. The tokens are always those of the text.

    Args:
        head: predicts.
        embedded: the tokens of the texts, from the second one on.
        hidden_states: the target's at the token before each.
        ahead: number of tokens predicted from each place.
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
    """Return which keys each token attends to, of those of all predictions so far, side by side."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at
    return torch.cat([distance >= step, *(distance == step - earlier for earlier in range(1, step + 1))], 1)
