"""A draft head made ready for its target, and how a target is known."""

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
from specdecode.heads.module import Head, HeadShape, Signature, Store
from specdecode.models.lm import LM

# Tokens whose embeddings a signature keeps, and how alike these must be, taken together: weights of 4 bits are 0.99
# like those that they were made of, and other models' have nothing in common.
_TOKENS, _ALIKE = 16, 0.95
# Columns of an output embedding that are found out at once.
_COLUMNS = 64

_ADVICE = "train one for it with `specdecode train-head`"


class FittedHead:
    """A copy of a head with what it shares with its target: in the target's type, on its device and, where the target's
    linear layers are packed, packed as they are.

    Args:
        head: may be trained on; this is a copy of what it is now.
        target: whose features it reads.

    Attributes:
        shape: of the head.
        tokens: of the target's vocabulary, those that it can propose.

    Raises:
        UnsupportedModelError: it does not fit the target's layers, embeddings or vocabulary.
    """

    def __init__(self, head: Head, target: LM) -> None:
        _check(head, target)
        self.shape = head.shape
        self.tokens = head.tokens.to(target.device)
        self._embedding = target.model.get_input_embeddings()
        rows = nn.Linear(head.shape.hidden, len(head.tokens), bias=False, device="meta")
        rows.weight = nn.Parameter(output_rows(target, head.tokens))
        self._head = copy.deepcopy(head).to(target.device, target.dtype)
        own = nn.ModuleList([self._head, rows])
        own.train(False).requires_grad_(False)
        if any(isinstance(module, PackedLinear) for module in target.model.modules()):
            pack(own)
        self._rows = own[1]

    def fused(self, features: Float[Tensor, "n F"]) -> Float[Tensor, "n H"]:
        """The states that features stand for."""
        fused: Tensor = self._head.fused(features)
        return fused

    def read(
        self,
        tokens: Int[Tensor, " n"],
        state: Float[Tensor, "n H"],
        positions: Int[Tensor, " n"],
        store: Store,
        visible: Bool[Tensor, "n s"],
    ) -> Float[Tensor, "n H"]:
        """The states at some tokens; the arguments are those of `Head`."""
        read: Tensor = self._head(self._embedding(tokens)[None], state[None], positions, store, visible)
        return read[0]

    def logits(self, state: Float[Tensor, "n H"]) -> Float[Tensor, "n D"]:
        """Of the tokens that it can propose."""
        logits: Tensor = self._rows(self._head.normed(state))
        return logits


def _check(head: Head, target: LM) -> None:
    shape, own = head.shape, signature(target)
    config = target.model.config.get_text_config(decoder=True)
    lacks = ""
    if config.hidden_size != shape.hidden or shape.layers[-1] >= own.layers:
        lacks = f"it has {own.layers} layers of width {config.hidden_size}"
    elif own.rows.shape[1] != shape.hidden:
        lacks = f"it embeds tokens in width {own.rows.shape[1]}"
    elif not 0 <= head.tokens.min() <= head.tokens.max() < own.vocab_size:
        lacks = f"it knows tokens 0 to {own.vocab_size - 1}"
    if lacks:
        raise UnsupportedModelError(
            f"a head over layers {', '.join(map(str, shape.layers))} of width {shape.hidden} that proposes tokens up to"
            f" {int(head.tokens.max())} cannot draft for {target.name}, as {lacks}: {_ADVICE}"
        )


@torch.no_grad()
def output_rows(target: LM, tokens: Int[Tensor, " D"]) -> Float[Tensor, "D H"]:
    """The rows of a target's output embedding for some tokens, without the bias.

    Packed and quantised layers have no plain weight to look at, but what any layer makes of unit vectors are its
    columns.

    Raises:
        UnsupportedModelError: it has no output embedding.
    """
    layer = target.model.get_output_embeddings()
    if layer is None:
        raise UnsupportedModelError(f"{target.name} has no output embedding that a head could share")
    width = target.model.config.get_text_config(decoder=True).hidden_size
    kind: dict[str, Any] = {"dtype": target.dtype, "device": target.device}
    chosen = tokens.to(target.device)
    bias = layer(torch.zeros(1, width, **kind))[:, chosen]
    columns = [layer(unit)[:, chosen] - bias for unit in torch.eye(width, **kind).split(_COLUMNS)]
    return torch.cat(columns).T.contiguous()


@torch.no_grad()
def signature(target: LM) -> Signature:
    """By what a target is known again."""
    config = target.model.config.get_text_config(decoder=True)
    tokens = torch.linspace(0, target.vocab_size - 1, _TOKENS).long()
    rows = target.model.get_input_embeddings()(tokens.to(target.device)).float().cpu()
    return Signature(target.name, target.vocab_size, config.num_hidden_layers, tokens, rows)


def shipped_head(name: str) -> Path | None:
    """The file of the head that comes with the package for a model of this name, if there is one."""
    file = Path(__file__).parents[1] / "assets" / f"{name}-head.safetensors"
    return file if file.exists() else None


def load_head(name: str, target: LM) -> FittedHead:
    """A trained head, fitted to its target.

    Args:
        name: a file of `specdecode train-head`, which ends in .safetensors, or a model that comes with a head.
        target: that it was trained for, in whatever type.

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
    head, known, _ = read_head(file)
    own = signature(target)
    other = ""
    if (known.layers, known.vocab_size) != (own.layers, own.vocab_size) or known.rows.shape != own.rows.shape:
        other = f"it has {_told(own)}, not {_told(known)}"
    elif cosine_similarity(known.rows.flatten(), own.rows.flatten(), 0) < _ALIKE:
        other = "its embeddings are others"
    if other:
        raise UnsupportedModelError(
            f"{file} is a head for {known.target} and cannot draft for {target.name}, as {other}: {_ADVICE}"
        )
    return FittedHead(head, target)


def _told(known: Signature) -> str:
    return f"{known.layers} layers, {known.vocab_size} tokens and embeddings of width {known.rows.shape[1]}"


def head_shape(target: LM, layers: Sequence[int]) -> HeadShape:
    """A head over some layers of a target with the proportions of the target's own layers."""
    config = target.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return HeadShape(
        hidden=config.hidden_size,
        layers=tuple(layers),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        # Rotary positions turn pairs.
        head_dim=max((getattr(config, "head_dim", None) or config.hidden_size // heads) // 2, 1) * 2,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    )


def untrained(target: LM, seed: int = 0) -> Head:
    """A head of random weights: it costs what a trained one does, and proposes at random a third of the tokens."""
    total = signature(target).layers
    shape = head_shape(target, sorted({total // 4, total // 2, total - 1}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Head(shape, torch.arange(0, target.vocab_size, 3))
