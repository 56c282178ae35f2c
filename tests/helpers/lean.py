"""Llama without transformers' wrappers, which take longer than a tiny model's arithmetic. It computes the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, rotate_half

from specdecode import LM

linear, sdpa = nn.functional.linear, nn.functional.scaled_dot_product_attention


def lean(target: LM) -> LM:
    """Make a Llama of plain layers run the forwards of decoding by `LeanLlama`."""
    assert type(target.model) is LlamaForCausalLM
    target.model.__class__ = LeanLlama
    return LM(target.model, name=target.name)


class LeanLlama(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama whose forwards over slots, with a mask for each token, call no module. All others are transformers'."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        **others: Any,
    ) -> Any:
        """Compute logits. [rows, n, V]"""
        layers = self.model.layers
        masked = attention_mask is not None and attention_mask.ndim == 4 and past_key_values is not None
        watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        if not masked or watched or output_attentions or others or self.config._attn_implementation != "sdpa":
            return super().forward(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                logits_to_keep=logits_to_keep,
                use_cache=use_cache,
                output_attentions=output_attentions,
                **others,
            )
        hidden = nn.functional.embedding(input_ids, self.model.embed_tokens.weight)
        cos, sin = (part[:, None] for part in self.model.rotary_emb.forward(hidden, position_ids))
        for layer in layers:
            hidden = hidden + _attend(
                layer.self_attn, _norm(layer.input_layernorm, hidden), cos, sin, attention_mask, past_key_values
            )
            hidden = hidden + _mlp(layer.mlp, _norm(layer.post_attention_layernorm, hidden))
        hidden = _norm(self.model.norm, hidden)[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=linear(hidden, self.lm_head.weight))


def _attend(
    attention: LlamaAttention, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any
) -> Tensor:
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    query, key, value = (
        linear(hidden, projection.weight).view(shape).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = (states * cos + rotate_half(states) * sin for states in (query, key))
    key, value = cache.update(key, value, attention.layer_idx)
    key, value = (states.repeat_interleave(attention.num_key_value_groups, 1) for states in (key, value))
    mixed = sdpa(query, key, value, attn_mask=mask, scale=attention.scaling)
    return linear(mixed.transpose(1, 2).reshape(*hidden.shape[:2], -1), attention.o_proj.weight)


def _mlp(mlp: LlamaMLP, hidden: Tensor) -> Tensor:
    gated = nn.functional.silu(linear(hidden, mlp.gate_proj.weight)) * linear(hidden, mlp.up_proj.weight)
    return linear(gated, mlp.down_proj.weight)


def _norm(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * wide.to(hidden.dtype)
