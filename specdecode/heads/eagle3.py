"""The module of an EAGLE-3 head (Li et al. 2025), in every variant that the `speculators` format has.

Its parameters have the names of that format, so that a file's tensors can be loaded directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdecode.backends.grouped_attention import GroupedAttention
from specdecode.heads.parts import Store, normed, rotated


@dataclass(frozen=True, slots=True)
class Eagle3Shape:
    """The sizes of a head, and its wiring: the connections of its parts.

    Attributes:
        decoder: configuration of the head's decoder layers: their sizes, positions and norms, and the target's
            vocabulary.
        layers: the target's layers whose outputs the head reads; -1 stands for the embeddings. The format counts from
            1: its `eagle_aux_hidden_state_layer_ids` are one higher.
        target_hidden: width of the target's hidden states.
        norm_before_residual: whether the first layer's residual is the normalised state, not the state itself.
        norm_before_fc: whether one norm is applied to the concatenated hidden states before `fc`.
        fc_norm: whether each layer's hidden states have their own norm before `fc`.
        norm_output: whether the next draft step reads the normalised state.
        own_embeddings: whether the head has its own embeddings; otherwise it shares the target's.
        own_output: whether the head has its own output embedding; otherwise it shares the target's.
    """

    decoder: LlamaConfig | Qwen3Config
    layers: tuple[int, ...]
    target_hidden: int
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    own_embeddings: bool = False
    own_output: bool = True

    @property
    def hidden(self) -> int:
        """Width of the head's states."""
        width: int = self.decoder.hidden_size
        return width


class Eagle3Head(nn.Module):
    """A head that predicts token i + 1 from the embedding of token i and the target's hidden states at token i - 1.

    If the target has not computed these hidden states, the head's own state at token i - 1 replaces them.

    Args:
        shape: sizes and wiring of the head.
        tokens: the D token ids of the target's vocabulary that the head can propose.
    """

    tokens: Int[Tensor, " D"]

    def __init__(self, shape: Eagle3Shape, tokens: Int[Tensor, " D"]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("tokens", tokens, persistent=False)
        decoder, width = shape.decoder, shape.hidden
        eps, fused = decoder.rms_norm_eps, len(shape.layers) * shape.target_hidden
        self.embed_tokens = nn.Embedding(decoder.vocab_size, width) if shape.own_embeddings else None
        self.input_norm = nn.RMSNorm(fused, eps) if shape.norm_before_fc else None
        norms = [nn.RMSNorm(shape.target_hidden, eps) for _ in shape.layers]
        self.fc_norm = nn.ModuleList(norms) if shape.fc_norm else None
        self.fc = nn.Linear(fused, width, bias=False)
        self.layers = nn.ModuleList(_DecoderLayer(decoder, layer) for layer in range(decoder.num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, len(tokens), bias=False) if shape.own_output else None
        # Qwen3 has the same rotary positions.
        self._rotary = _Rotary(decoder)  # type: ignore[arg-type]

    def fused(self, hidden_states: Float[Tensor, "*b n F"]) -> Float[Tensor, "*b n H"]:
        """Return the head's states for the target's hidden states after its `layers`, concatenated."""
        if self.input_norm is not None:
            hidden_states = normed(self.input_norm, hidden_states)
        if self.fc_norm is not None:
            parts = hidden_states.chunk(len(self.fc_norm), -1)
            hidden_states = torch.cat([normed(norm, part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        fused: Tensor = self.fc(hidden_states)
        return fused

    def forward(
        self,
        embedded: Float[Tensor, "b n H"],
        state: Float[Tensor, "b n H"],
        positions: Int[Tensor, " n"],
        store: Store,
        visible: Bool[Tensor, "n s"],
    ) -> Float[Tensor, "b n H"]:
        """Return the head's states at some tokens, which the next draft step reads.

        Args:
            embedded: embeddings of the tokens.
            state: for each token, the state at the token before it: the `fused` hidden states, or this function's
                result there.
            positions: positions of the tokens.
            store: stores the keys and values.
            visible: row i marks the keys that token i attends to, among the s keys in the store.
        """
        tables = self._rotary(embedded, positions[None])
        x = state
        for layer in self.layers:
            assert isinstance(layer, _DecoderLayer)
            if layer.hidden_norm is None:
                inputs, residual = normed(layer.input_layernorm, x), x
            else:
                joined = normed(layer.hidden_norm, state)
                inputs = torch.cat([normed(layer.input_layernorm, embedded), joined], -1)
                residual = joined if self.shape.norm_before_residual else state
            x = layer(inputs, residual, tables, store, visible)
        return normed(self.norm, x) if self.shape.norm_output else x

    def normed(self, state: Float[Tensor, "*b n H"]) -> Float[Tensor, "*b n H"]:
        """Return the normalised states, which are the input of an output embedding."""
        return state if self.shape.norm_output else normed(self.norm, state)

    def logits(self, state: Float[Tensor, "*b n H"], rows: Float[Tensor, "D H"]) -> Float[Tensor, "*b n D"]:
        """Return the logits of the D tokens that the head can propose.

        Args:
            state: states of the head.
            rows: output embedding of these tokens.
        """
        logits: Tensor = self.normed(state) @ rows.T
        return logits


class _DecoderLayer(nn.Module):
    """A decoder layer of Llama or Qwen3. The first layer of a head reads an embedding and a state, concatenated."""

    def __init__(self, config: LlamaConfig | Qwen3Config, number: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.hidden_norm = None if number else nn.RMSNorm(width, config.rms_norm_eps)
        self.self_attn = _Attention(config, number)
        self.post_attention_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.mlp = _FeedForward(width, config.intermediate_size, bias=getattr(config, "mlp_bias", False))

    def forward(self, inputs: Tensor, residual: Tensor, tables: Any, store: Store, visible: Tensor) -> Tensor:
        x = residual + self.self_attn(inputs, tables, store, visible)
        output: Tensor = x + self.mlp(normed(self.post_attention_layernorm, x))
        return output


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig | Qwen3Config, number: int) -> None:
        super().__init__()
        self._number, self._head_dim = number, _head_dim(config)
        inputs, bias = (1 if number else 2) * config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * self._head_dim
        keys = (config.num_key_value_heads or config.num_attention_heads) * self._head_dim
        self.q_proj = nn.Linear(inputs, queries, bias=bias)
        self.k_proj = nn.Linear(inputs, keys, bias=bias)
        self.v_proj = nn.Linear(inputs, keys, bias=bias)
        self.attend = GroupedAttention()
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)
        by_head = isinstance(config, Qwen3Config)
        self.q_norm = nn.RMSNorm(self._head_dim, config.rms_norm_eps) if by_head else None
        self.k_norm = nn.RMSNorm(self._head_dim, config.rms_norm_eps) if by_head else None

    def forward(self, inputs: Tensor, tables: Any, store: Store, visible: Tensor) -> Tensor:
        queries, keys, values = (
            project(inputs).unflatten(-1, (-1, self._head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = normed(self.q_norm, queries), normed(self.k_norm, keys)
        queries, keys = (rotated(x.transpose(1, 2), *tables) for x in (queries, keys))
        keys, values = store(keys, values.transpose(1, 2), self._number)
        output: Tensor = self.o_proj(self.attend(queries, keys, values, visible).flatten(-2))
        return output


def _head_dim(config: LlamaConfig | Qwen3Config) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


class _FeedForward(nn.Module):
    def __init__(self, width: int, intermediate: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=bias)
        self.up_proj = nn.Linear(width, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, width, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.down_proj(silu(self.gate_proj(inputs)) * self.up_proj(inputs))
        return output


class _Rotary(LlamaRotaryEmbedding):
    """Tables of rotary positions. The frequencies stay in float32, even in a head of another type: 16 bits are too few
    for the angles of long texts."""

    def _apply(self, fn: Any, recurse: bool = True) -> _Rotary:
        before = {name: buffer.float() for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, frequencies in before.items():
            setattr(self, name, frequencies.to(getattr(self, name).device))
        return self
