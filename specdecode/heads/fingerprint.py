"""The values that identify the target of a draft head, and the refusal of another target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from specdecode.core.errors import UnsupportedModelError
from specdecode.models.lm import LM

ADVICE = "train one for it with `specdecode train-head`"
"""Advice of messages where no head fits a target."""

# Number of tokens whose embeddings a fingerprint holds.
_TOKENS = 16
# Least cosine similarity of the embeddings of one target in two types. The similarity of 4-bit weights to their
# originals is 0.99, and the similarity of different models is near 0.
_LEAST_SIMILARITY = 0.95


@dataclass(frozen=True, slots=True)
class TargetFingerprint:
    """The values that identify the target of a head, for any type of the target's weights. A head's folder stores them.

    Attributes:
        target: name of the target.
        vocab_size: width of the target's logits.
        layers: number of the target's layers.
        tokens: some token ids of the target's vocabulary.
        rows: the target's embeddings of these tokens.
    """

    target: str
    vocab_size: int
    layers: int
    tokens: Int[Tensor, " n"]
    rows: Float[Tensor, "n H"]


@torch.no_grad()
def target_fingerprint(target: LM) -> TargetFingerprint:
    """Return the fingerprint of a target."""
    tokens = torch.linspace(0, target.vocab_size - 1, _TOKENS).long()
    rows = target.model.get_input_embeddings()(tokens.to(target.device)).float().cpu()
    return TargetFingerprint(target.name, target.vocab_size, target.config.num_hidden_layers, tokens, rows)


def check_fingerprint(folder: Path, trained_for: TargetFingerprint, target: LM) -> None:
    """Raise UnsupportedModelError if a head was trained for another target.

    Args:
        folder: folder of the head, for the message.
        trained_for: the fingerprint of the target that the head was trained for.
        target: the target that the head is to draft for.
    """
    target_is = target_fingerprint(target)
    difference = ""
    if _sizes(trained_for) != _sizes(target_is) or trained_for.rows.shape != target_is.rows.shape:
        difference = f"it has {_sizes(target_is)}, not {_sizes(trained_for)}"
    elif cosine_similarity(trained_for.rows.flatten(), target_is.rows.flatten(), 0) < _LEAST_SIMILARITY:
        difference = "its embeddings differ"
    if difference:
        raise UnsupportedModelError(
            f"{folder} is a head for {trained_for.target} and cannot draft for {target.name}, as {difference}: {ADVICE}"
        )


def _sizes(target: TargetFingerprint) -> str:
    return f"{target.layers} layers, {target.vocab_size} tokens and embeddings of width {target.rows.shape[1]}"
