"""The module of a draft head: one transformer layer that continues a target's hidden states.

(EAGLE, Li et al. 2024; hidden states of several layers and training on its own predictions as in EAGLE-3, Li et al.
2025.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from specdecode.backends.grouped_attention import GroupedAttention

Store = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""A function that stores the keys and values, each [b, heads, n, dim], of the tokens that are read. Its arguments are
the keys, the values and the number of the head's layer. It returns all keys and values that these tokens may attend
to."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The sizes of a head.

    Attributes:
        hidden: width H of the head's states and of the target's hidden states.
        layers: the target's layers whose hidden states the head reads, ascending.
        heads: number of attention heads of the queries.
        kv_heads: number of attention heads of the keys and values.
        head_dim: width of an attention head, an even number.
        intermediate: width of the feed-forward part.
        theta: base of the rotary positions (Su et al. 2021).
        target_hidden: width of the target's hidden states, equal to `hidden`.
    """

    hidden: int
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    theta: float = 10_000.0

    @property
    def target_hidden(self) -> int:
        return self.hidden


@dataclass(frozen=True, slots=True)
class TargetFingerprint:
    """The values that identify the target of a head, for any type of the target's weights. A head's file stores them.

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


class Head(nn.Module):
    """A head that predicts token i + 1 from the embedding of token i and the target's hidden states at token i - 1.

    If the target has not computed these hidden states, the head's own state at token i - 1 replaces them.

    Args:
        shape: sizes of the head.
        tokens: the D token ids of the target's vocabulary that the head can propose.
    """

    tokens: Int[Tensor, " D"]

    def __init__(self, shape: HeadShape, tokens: Int[Tensor, " D"]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("tokens", tokens)
        width, inner = shape.hidden, shape.heads * shape.head_dim
        self.fuse = nn.Linear(len(shape.layers) * width, width, bias=False)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.embedding_norm = nn.RMSNorm(width, eps=1e-5)
        self.state_norm = nn.RMSNorm(width, eps=1e-5)
        self.input_layernorm = nn.RMSNorm(width, eps=1e-5)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=False)
        self.attend = GroupedAttention()
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=1e-5)
        self.gate_proj = nn.Linear(width, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(width, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        # The head shares both with its target.
        self.embed_tokens = self.lm_head = None

    def fused(self, hidden_states: Float[Tensor, "*b n F"]) -> Float[Tensor, "*b n H"]:
        """Return the head's states for the target's hidden states, concatenated to F columns. Each layer's hidden
        states are normalised first, since they grow from layer to layer."""
        layers = hidden_states.unflatten(-1, (len(self.shape.layers), self.shape.hidden))
        fused: Tensor = self.fuse(rms_norm(layers, (self.shape.hidden,), eps=1e-5).flatten(-2))
        return fused

    def forward(
        self,
        embedded: Float[Tensor, "b n H"],
        state: Float[Tensor, "b n H"],
        positions: Int[Tensor, " n"],
        store: Store,
        visible: Bool[Tensor, "n s"],
    ) -> Float[Tensor, "b n H"]:
        """Return the head's states at some tokens.

        Args:
            embedded: the target's embeddings of the tokens.
            state: for each token, the state at the token before it: the `fused` hidden states, or this function's
                result there.
            positions: positions of the tokens.
            store: stores the keys and values.
            visible: row i marks the keys that token i attends to, among the s keys in the store.
        """
        x = self.join(torch.cat([normed(self.embedding_norm, embedded), normed(self.state_norm, state)], -1))
        inputs = normed(self.input_layernorm, x)
        queries, keys, values = (
            project(inputs).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        tables = self._rotary_tables(positions.to(x.device))
        keys, values = store(rotated(keys, *tables), values, 0)
        attended = self.attend(rotated(queries, *tables), keys, values, visible)
        x = x + self.o_proj(attended.flatten(-2))
        inputs = normed(self.post_attention_layernorm, x)
        states: Tensor = x + self.down_proj(silu(self.gate_proj(inputs)) * self.up_proj(inputs))
        return states

    def normed(self, state: Float[Tensor, "*b n H"]) -> Float[Tensor, "*b n H"]:
        """Return the normalised states, which are the input of an output embedding."""
        return normed(self.norm, state)

    def _rotary_tables(self, positions: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
        half = self.shape.head_dim // 2
        frequencies = self.shape.theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
        angles = (positions[:, None].float() * frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def rotated(
    x: Float[Tensor, "b heads n dim"], cos: Float[Tensor, "*_ n dim"], sin: Float[Tensor, "*_ n dim"]
) -> Float[Tensor, "b heads n dim"]:
    """Rotate each component of an attention head's first half with its partner in the second half (Su et al. 2021)."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply an RMS norm in the type of `x`. In autocast training `x` has 16 bits, and there are no kernels for mixed
    types."""
    assert isinstance(norm, nn.RMSNorm)
    return rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
