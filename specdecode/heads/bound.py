"""A draft head bound to its target, and the fingerprint of a target."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from specdecode.backends.packed import PackedLinear, pack
from specdecode.core.errors import ModelFileError, UnsupportedModelError
from specdecode.heads.formats import read_head
from specdecode.heads.module import Head, HeadShape, Store, TargetFingerprint
from specdecode.models.lm import LM

# Tokens whose embeddings a fingerprint holds, and the least cosine similarity of all these of one target: that of 4-bit
# weights to their originals is 0.99, and that of different models is near 0.
_FINGERPRINT_TOKENS, _LEAST_SIMILARITY = 16, 0.95
# Columns of an output embedding that are computed at once.
_COLUMNS = 64

_ADVICE = "train one for it with `specdecode train-head`"


class BoundHead:
    """Bind a copy of a head to its target, whose embeddings it shares.

    The copy has the target's type and device. Its linear layers are packed if the target's are.

    Args:
        head: is not changed, and may be trained further.
        target: whose hidden states it reads.

    Attributes:
        shape: of the head.
        tokens: of the target's vocabulary that it can propose.

    Raises:
        UnsupportedModelError: the head does not fit the target's layers, embeddings or vocabulary.
    """

    def __init__(self, head: Head, target: LM) -> None:
        _check(head, target)
        self.shape = head.shape
        self.tokens = head.tokens.to(target.device)
        self._embedding = target.model.get_input_embeddings()
        rows = nn.Linear(head.shape.hidden, len(head.tokens), bias=False, device="meta")
        rows.weight = nn.Parameter(output_rows(target, head.tokens))
        self._head = copy.deepcopy(head).to(target.device, target.dtype)
        modules = nn.ModuleList([self._head, rows])
        modules.train(False).requires_grad_(False)
        if any(isinstance(module, PackedLinear) for module in target.model.modules()):
            pack(modules)
        self._rows = modules[1]

    def fused(self, hidden_states: Float[Tensor, "n F"]) -> Float[Tensor, "n H"]:
        """Return the head's states for the target's hidden states."""
        fused: Tensor = self._head.fused(hidden_states)
        return fused

    def read(
        self,
        tokens: Int[Tensor, " n"],
        state: Float[Tensor, "n H"],
        positions: Int[Tensor, " n"],
        store: Store,
        visible: Bool[Tensor, "n s"],
    ) -> Float[Tensor, "n H"]:
        """Return the states at some tokens; see `Head.forward`."""
        states: Tensor = self._head(self._embedding(tokens)[None], state[None], positions, store, visible)
        return states[0]

    def logits(self, state: Float[Tensor, "n H"]) -> Float[Tensor, "n D"]:
        """Return the logits of the tokens that it can propose."""
        logits: Tensor = self._rows(self._head.normed(state))
        return logits


def _check(head: Head, target: LM) -> None:
    """Raise UnsupportedModelError if the head does not fit the target."""
    shape, target_is = head.shape, fingerprint(target)
    config = target.model.config.get_text_config(decoder=True)
    difference = ""
    if config.hidden_size != shape.hidden or shape.layers[-1] >= target_is.layers:
        difference = f"it has {target_is.layers} layers of width {config.hidden_size}"
    elif target_is.rows.shape[1] != shape.hidden:
        difference = f"it embeds tokens in width {target_is.rows.shape[1]}"
    elif not 0 <= head.tokens.min() <= head.tokens.max() < target_is.vocab_size:
        difference = f"it knows tokens 0 to {target_is.vocab_size - 1}"
    if difference:
        raise UnsupportedModelError(
            f"a head over layers {', '.join(map(str, shape.layers))} of width {shape.hidden} that proposes tokens up to"
            f" {int(head.tokens.max())} cannot draft for {target.name}, as {difference}: {_ADVICE}"
        )


@torch.no_grad()
def output_rows(target: LM, tokens: Int[Tensor, " D"]) -> Float[Tensor, "D H"]:
    """Return the rows of a target's output embedding for some tokens, without the bias.

    Packed and quantised layers have no plain weight to read, but any layer maps unit vectors to its columns.

    Raises:
        UnsupportedModelError: the target has no output embedding.
    """
    layer = target.model.get_output_embeddings()
    if layer is None:
        raise UnsupportedModelError(f"{target.name} has no output embedding that a head could share")
    width = target.model.config.get_text_config(decoder=True).hidden_size
    options: dict[str, Any] = {"dtype": target.dtype, "device": target.device}
    chosen = tokens.to(target.device)
    bias = layer(torch.zeros(1, width, **options))[:, chosen]
    columns = [layer(units)[:, chosen] - bias for units in torch.eye(width, **options).split(_COLUMNS)]
    return torch.cat(columns).T.contiguous()


@torch.no_grad()
def fingerprint(target: LM) -> TargetFingerprint:
    """Return the fingerprint of a target."""
    config = target.model.config.get_text_config(decoder=True)
    tokens = torch.linspace(0, target.vocab_size - 1, _FINGERPRINT_TOKENS).long()
    rows = target.model.get_input_embeddings()(tokens.to(target.device)).float().cpu()
    return TargetFingerprint(target.name, target.vocab_size, config.num_hidden_layers, tokens, rows)


def shipped_head(name: str) -> Path | None:
    """Return the file of the head that the package brings for a model of this name; None if it brings none."""
    file = Path(__file__).parents[1] / "assets" / f"{name}-head.safetensors"
    return file if file.exists() else None


def load_head(name: str, target: LM) -> BoundHead:
    """Load a trained head and bind it to its target.

    Args:
        name: a file of `specdecode train-head`, which ends in .safetensors, or a model that comes with a head.
        target: the model that the head was trained for, in any type.

    Raises:
        ModelFileError: no head by that name, or a damaged file.
        UnsupportedModelError: it was trained for another target.
    """
    file = Path(name).expanduser() if name.endswith(".safetensors") else shipped_head(name)
    if file is None:
        raise ModelFileError(
            f"no head comes with the package for {name!r}: name the file of one, which ends in .safetensors, or"
            f" {_ADVICE}"
        )
    head, trained_for, _ = read_head(file)
    target_is = fingerprint(target)
    difference = ""
    if _sizes(trained_for) != _sizes(target_is) or trained_for.rows.shape != target_is.rows.shape:
        difference = f"it has {_sizes(target_is)}, not {_sizes(trained_for)}"
    elif cosine_similarity(trained_for.rows.flatten(), target_is.rows.flatten(), 0) < _LEAST_SIMILARITY:
        difference = "its embeddings are others"
    if difference:
        raise UnsupportedModelError(
            f"{file} is a head for {trained_for.target} and cannot draft for {target.name}, as {difference}: {_ADVICE}"
        )
    return BoundHead(head, target)


def _sizes(target: TargetFingerprint) -> str:
    return f"{target.layers} layers, {target.vocab_size} tokens and embeddings of width {target.rows.shape[1]}"


def head_shape(target: LM, layers: Sequence[int]) -> HeadShape:
    """Return the shape of a head over some layers of a target, with the proportions of the target's layers."""
    config = target.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return HeadShape(
        hidden=config.hidden_size,
        layers=tuple(layers),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        # Rotary positions rotate pairs, so the width is even.
        head_dim=max((getattr(config, "head_dim", None) or config.hidden_size // heads) // 2, 1) * 2,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    )


def untrained(target: LM, seed: int = 0) -> Head:
    """Return a head of random weights over a third of the tokens. It costs what a trained one does."""
    total = fingerprint(target).layers
    shape = head_shape(target, sorted({total // 4, total // 2, total - 1}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Head(shape, torch.arange(0, target.vocab_size, 3))
