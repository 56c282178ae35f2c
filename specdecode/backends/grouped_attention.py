"""Grouped-query attention over several rows, without copies of the keys and values that heads share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped_sdpa"
"""The name under which transformers knows `attend` as an attention function."""


def group(model: PreTrainedModel) -> None:
    """Switch a model whose heads share keys and values to `attend`. The model gets its own copy of its configuration.

    transformers repeats all keys and values for each head of a group if more than one row is masked. Verifying a draft
    masks several rows, so transformers would copy the cache in every step.
    """
    config = model.config.get_text_config(decoder=True)
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared not in (None, heads):
        switch_attention(model, GROUPED, attend)


def switch_attention(model: PreTrainedModel, name: str, attention: Callable[..., Any]) -> None:
    """Switch a model that uses PyTorch's attention to another function. It gets its own copy of its configuration.

    Args:
        model: the model. One that uses another attention stays as it is.
        name: the name under which transformers will know the function.
        attention: the function.
    """
    if model.config.get_text_config(decoder=True)._attn_implementation != "sdpa":
        return
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    own_config(model)
    model.set_attn_implementation(name)


def own_config(model: PreTrainedModel) -> PretrainedConfig:
    """Give a model and its modules their own copy of the configuration, so that changes reach no other model."""
    shared, copied = model.config, copy.deepcopy(model.config)
    text = copied.get_text_config(decoder=True)
    for module in model.modules():
        if isinstance(vars(module).get("config"), PretrainedConfig):
            vars(module)["config"] = copied if vars(module)["config"] is shared else text
    return copied


def attend(
    module: Any,
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length width"],
    attention_mask: Shaped[Tensor, "batch _ n length"] | None,
    **others: Any,
) -> tuple[Float[Tensor, "batch n heads width"], None]:
    """Attend like transformers' SDPA, with the query heads of a group as further rows of their shared key head.

    Returns:
        The attended values, and None in place of attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    plain = attention_mask is None or attention_mask.shape[1] > 1 or others.get("position_bias") is not None
    if plain or groups == 1:
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return attended
    return attend_in_groups(query, key, value, attention_mask, **others), None


def attend_in_groups(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length width"],
    attention_mask: Shaped[Tensor, "batch 1 n length"] | None,
    **others: Any,
) -> Float[Tensor, "batch n heads width"]:
    """Return the attended values. The query heads of a group are further rows of their shared key head."""
    shared, rows = key.shape[1], query.shape[2]
    groups = query.shape[1] // shared
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask] * groups, dim=2)  # `repeat` prepares more
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(query.shape[0], shared, groups * rows, query.shape[3]),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=others.get("dropout", 0.0),
        scale=others.get("scaling"),
    )
    return output.reshape(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous()
