"""The head that a training starts with: a copy of the target's last layer, or a head of an earlier training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from specdecode.backends.layers import decoder_layers
from specdecode.heads.bound import head_shape, target_sizes
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import WEIGHTS, make_eagle3
from specdecode.heads.fingerprint import check_fingerprint
from specdecode.heads.loading import head_files
from specdecode.models.lm import LM
from specdecode.models.recording import recorded_hidden_states
from specdecode.models.variants import final_norm
from specdecode.support.files import sha256
from specdecode.training.shards import read_distributions

# Standard deviation of initial weights that the target does not provide.
_INITIAL_DEVIATION = 0.02


def initial_head(
    target: LM, layers: Sequence[int], tokens: Int[Tensor, " D"], text: Int[Tensor, " n"], seed: int = 0
) -> Eagle3Head:
    """Return an untrained head that starts as a copy of the target's last layer, where the weights fit.

    At first the head reads only the hidden states of the last selected layer, scaled to the size of the inputs of the
    target's last layer. Its norm is the target's final norm.

    Args:
        target: the target, loaded with backend="eager".
        layers: numbers of the target's layers whose hidden states the head reads.
        tokens: token ids that the head can propose.
        text: token ids of a text, from which the size of the last layer's inputs is measured.
        seed: seed of the random weights.
    """
    shape = head_shape(target, layers)
    width = shape.hidden
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Eagle3Head(shape, tokens)
        with torch.no_grad():
            for weight in head.parameters():
                if weight.dim() == 2:
                    weight.normal_(0.0, _INITIAL_DEVIATION)
            head.fc.weight[:, -width:] += _input_size(target, text) * torch.eye(width)
    weights = head.state_dict()
    # Llama and its many relatives use these names. Modules with other names keep random weights.
    norm = final_norm(target.model)
    target_weights = {} if norm is None else {f"norm.{name}": value for name, value in norm.state_dict().items()}
    if (stack := decoder_layers(target.model)) is not None:
        target_weights |= {f"layers.0.{name}": value for name, value in stack[-1].state_dict().items()}
    # The layer's input norm becomes the head's norm of hidden states. The head's norm of embeddings has no counterpart.
    hidden_norm = target_weights.pop("layers.0.input_layernorm.weight", None)
    if hidden_norm is not None:
        target_weights["layers.0.hidden_norm.weight"] = hidden_norm
    for name, value in target_weights.items():
        if name not in weights:
            continue
        if weights[name].shape == value.shape:
            weights[name] = value.float().cpu()
        elif weights[name].shape == (len(value), 2 * width) and value.shape[1:] == (width,):
            # The head reads the embedding first, then the inputs of the target's layer.
            weights[name][:, width:] = value.float().cpu()
    head.load_state_dict(weights)
    return head


@dataclass(frozen=True, slots=True)
class Start:
    """A head of an earlier training, to be trained further.

    Attributes:
        name: name of the head, as for `load_head`.
        head: the head, in float32. It has the target's output embedding.
        digest: digest of the file of its weights.
        card: the record of the earlier training.
    """

    name: str
    head: Eagle3Head
    digest: str
    card: Mapping[str, Any]


def earlier_head(name: str, target: LM) -> Start:
    """Load a head that `train_head` wrote, to train it further.

    Args:
        name: as for `load_head`.
        target: the target of the head.

    Raises:
        ModelFileError: there is no head of that name, or its files are damaged.
        UnsupportedModelError: the head was trained for another target.
        ValueError: the head was written by something else, and may have embeddings of its own.
    """
    files = head_files(name)
    if files.fingerprint is None or files.card is None:
        raise ValueError(f"start is {name}, which `train-head` did not write: it trains only its own heads further")
    check_fingerprint(files.folder, files.fingerprint, target)
    # The output embedding in the folder is the target's, for other engines.
    own = {key: tensor for key, tensor in files.tensors.items() if key != "lm_head.weight"}
    head = make_eagle3(replace(files, tensors=own), *target_sizes(target))
    return Start(name, head, sha256(files.folder / WEIGHTS)[:16], files.card)


@torch.inference_mode()
def _input_size(target: LM, text: Int[Tensor, " n"]) -> float:
    """Return the root mean square of the last layer's inputs, as a median over tokens: some tokens are outliers."""
    layer_before_last = target_sizes(target)[0] - 2
    if layer_before_last < 0:
        return 1.0
    with recorded_hidden_states(target.model, [layer_before_last]) as hidden_states:
        target.model(text[None].to(target.device), use_cache=False)
    size: float = hidden_states[0].float().square().mean(-1).sqrt().median().item()
    return size


def frequent_tokens(shards: Sequence[Path], count: int) -> Int[Tensor, " D"]:
    """Return the tokens with the largest expected frequency in the texts of the shards, ascending.

    The result has fewer than `count` tokens if the target expects no others.
    """
    frequencies = torch.zeros(0)
    for file in shards:
        top, probs = read_distributions(file)
        in_shard = torch.bincount(top.flatten(), probs.flatten())
        size = max(len(in_shard), len(frequencies))
        frequencies = pad(frequencies, (0, size - len(frequencies))) + pad(in_shard, (0, size - len(in_shard)))
    best = frequencies.topk(min(count, int((frequencies > 0).sum()))).indices
    return best.sort().values
