"""A draft head bound to its target, and the fingerprint of a target."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from specdecode.backends.packed import PackedLinear, pack
from specdecode.core.errors import UnsupportedModelError
from specdecode.heads.eagle3 import Eagle3Head, Eagle3Shape
from specdecode.heads.module import Head, Store, TargetFingerprint
from specdecode.models.lm import LM

# Tokens whose embeddings a fingerprint holds.
_FINGERPRINT_TOKENS = 16
# Columns of an output embedding that are computed at once.
_COLUMNS = 64

DraftHead: TypeAlias = Head | Eagle3Head
"""A module that drafts from a target's hidden states, and from its own states after those."""

ADVICE = "train one for it with `specdecode train-head`"
"""What to do where no head fits a target."""


class BoundHead:
    """Bind a copy of a head to its target. What the head lacks of embeddings, it shares with the target.

    The copy has the target's type and device. Its linear layers are packed if the target's are.

    Args:
        head: is not changed, and may be trained further.
        target: whose hidden states it reads.

    Attributes:
        layers: of the target, whose hidden states it reads.
        tokens: of the target's vocabulary that it can propose.

    Raises:
        UnsupportedModelError: the head does not fit the target's layers, embeddings or vocabulary.
    """

    def __init__(self, head: DraftHead, target: LM) -> None:
        check_fit(head, target)
        self.layers: tuple[int, ...] = head.shape.layers
        self.tokens = head.tokens.to(target.device)
        copied = copy.deepcopy(head).to(target.device, target.dtype)
        embedding: nn.Module | None = copied.embed_tokens
        self._embedding: nn.Module = target.model.get_input_embeddings() if embedding is None else embedding
        rows: nn.Module | None = copied.lm_head
        if rows is None:
            rows = nn.Linear(head.shape.hidden, len(head.tokens), bias=False, device="meta")
            rows.weight = nn.Parameter(output_rows(target, head.tokens))
        modules = nn.ModuleList([copied, rows])
        modules.train(False).requires_grad_(False)
        if any(isinstance(module, PackedLinear) for module in target.model.modules()):
            pack(modules)
        self._head: DraftHead = copied
        # Packing puts another module in its place.
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


def check_fit(head: DraftHead, target: LM) -> None:
    """Raise UnsupportedModelError if the head does not fit the target."""
    shape, target_is = head.shape, target_fingerprint(target)
    total, width = target_sizes(target)
    shares = head.embed_tokens is None or head.lm_head is None
    difference = ""
    if width != shape.target_hidden or not -1 <= min(shape.layers) <= max(shape.layers) < total:
        difference = f"it has {total} layers of width {width}"
    elif shares and target_is.rows.shape[1] != shape.hidden:
        difference = f"it embeds tokens in width {target_is.rows.shape[1]}"
    elif not 0 <= head.tokens.min() <= head.tokens.max() < target_is.vocab_size:
        difference = f"it knows tokens 0 to {target_is.vocab_size - 1}"
    if difference:
        raise UnsupportedModelError(
            f"a head over layers {', '.join(map(str, shape.layers))} of width {shape.target_hidden} that proposes"
            f" tokens up to {int(head.tokens.max())} cannot draft for {target.name}, as {difference}: {ADVICE}"
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
def target_fingerprint(target: LM) -> TargetFingerprint:
    """Return the fingerprint of a target."""
    config = target.model.config.get_text_config(decoder=True)
    tokens = torch.linspace(0, target.vocab_size - 1, _FINGERPRINT_TOKENS).long()
    rows = target.model.get_input_embeddings()(tokens.to(target.device)).float().cpu()
    return TargetFingerprint(target.name, target.vocab_size, config.num_hidden_layers, tokens, rows)


def target_sizes(target: LM) -> tuple[int, int]:
    """Return the number of a target's layers, and the width of its hidden states."""
    config = target.model.config.get_text_config(decoder=True)
    return config.num_hidden_layers, config.hidden_size


def head_shape(target: LM, layers: Sequence[int]) -> Eagle3Shape:
    """Return the shape of a head over some layers of a target, with the proportions of the target's layers.

    It normalises each layer's hidden states, since they grow from layer to layer, and shares the target's embeddings.
    """
    config = target.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    rotary = getattr(config, "rope_parameters", None) or {}
    whole = rotary.get("partial_rotary_factor", 1.0) == 1.0 and "rope_type" in rotary
    kind = Qwen3Config if config.model_type == "qwen3" else LlamaConfig
    decoder = kind(
        vocab_size=target.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        # Rotary positions rotate pairs, so the width is even.
        head_dim=max((getattr(config, "head_dim", None) or config.hidden_size // heads) // 2, 1) * 2,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-5),
        max_position_embeddings=target.context_length,
        rope_parameters=dict(rotary) if whole else {"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
    )
    return Eagle3Shape(decoder, tuple(layers), config.hidden_size, fc_norm=True, own_output=False)


def untrained(target: LM, seed: int = 0) -> Eagle3Head:
    """Return a head of random weights over a third of the tokens. It costs what a trained one does."""
    total, _ = target_sizes(target)
    shape = head_shape(target, sorted({total // 4, total // 2, total - 1}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Eagle3Head(shape, torch.arange(0, target.vocab_size, 3))
