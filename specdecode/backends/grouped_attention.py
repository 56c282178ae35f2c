"""Attention over several rows: no copies of the keys and values that heads share, and no masked scores of a text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped_sdpa"
"""The name under which transformers knows `attend` as an attention function."""

_text_rows: ContextVar[int] = ContextVar("_text_rows", default=0)


@contextmanager
def text_rows(count: int) -> Iterator[None]:
    """Within this context, the first `count` rows of a forward are the beginning of a text. Each attends to itself and
    to all rows before it, and to nothing else."""
    token = _text_rows.set(count)
    try:
        yield
    finally:
        _text_rows.reset(token)


def group(model: PreTrainedModel) -> None:
    """Switch a model that uses PyTorch's attention to `attend`. The model gets its own copy of its configuration.

    transformers repeats all keys and values for each head of a group if more than one row is masked. Verifying a draft
    masks several rows, so transformers would copy the cache in every step. And it computes all scores of a masked
    prompt, of which a text needs half.
    """
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

    Rows of a text (see `text_rows`) attend without a mask.

    Returns:
        The attended values, and None in place of attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    attended: tuple[Tensor, None]
    if attention_mask is None or attention_mask.shape[1] > 1 or others.get("position_bias") is not None:
        attended = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return attended
    if text := attends_to_text(query, key):
        first = attend_to_text(module, query, key, value, text, **others)
        if text == query.shape[2]:
            return first, None
        rest, _ = attend(module, query[:, :, text:], key, value, attention_mask[:, :, text:], **others)
        return torch.cat([first, rest], dim=1), None
    if groups == 1:
        attended = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return attended
    return attend_in_groups(query, key, value, attention_mask, **others), None


def attends_to_text(query: Float[Tensor, "batch heads n dim"], key: Float[Tensor, "batch shared length dim"]) -> int:
    """Return the number of the first rows that are the beginning of a text; 0 if there are keys of earlier forwards."""
    if torch.compiler.is_compiling() or query.shape[2] < key.shape[2]:  # compiled code reads with masks
        return 0
    return _text_rows.get()


def attend_to_text(
    module: Any,
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length width"],
    text: int,
    **others: Any,
) -> Float[Tensor, "batch text heads width"]:
    """Return the attended values of the first rows, which are the beginning of a text."""
    query, key, value = (tensor[:, :, :text] for tensor in (query, key, value))
    attended: Tensor = sdpa_attention_forward(module, query, key, value, None, **others | {"is_causal": True})[0]
    return attended


def attend_in_groups(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch shared length dim"],
    value: Float[Tensor, "batch shared length width"],
    attention_mask: Shaped[Tensor, "#batch 1 n length"] | None,
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


class GroupedAttention(nn.Module):
    """The attention of a draft head: `attend_in_groups`, as a module that a backend can replace."""

    def forward(
        self,
        query: Float[Tensor, "batch heads n dim"],
        key: Float[Tensor, "batch shared length dim"],
        value: Float[Tensor, "batch shared length dim"],
        visible: Bool[Tensor, "n length"],
    ) -> Float[Tensor, "batch n heads dim"]:
        """Return the attended values. Row i of `visible` marks the slots that row i of each query attends to."""
        return attend_in_groups(query, key, value, visible[None, None])
