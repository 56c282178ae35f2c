"""Checks of a model's configuration, modules and signature, before any forward."""

from __future__ import annotations

import inspect
import sys

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from specdecode.backends.grouped_attention import GROUPED
from specdecode.backends.kernels import BY_KERNEL, BY_KERNEL_ROWS
from specdecode.backends.packed import PackedLinear
from specdecode.backends.row_attention import BY_ROWS
from specdecode.models.quantized_linear import Int4Linear, Int8Linear
from specdecode.models.wrapped import unloaded_reason

_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def context_length(config: PretrainedConfig) -> int:
    """Return the largest number of positions with which the rotation of cached keys stays valid."""
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # In longer texts the rotation of all positions uses other factors, so cached keys would be wrong.
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return int(limit)


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the width of a model's sliding-window attention; None if no layer has a window."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return the reason why a model cannot be decoded exactly, by its weights or configuration; None if none is
    found."""
    if unloaded := unloaded_reason(model):
        return unloaded
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if unsupported := sorted(set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYER_TYPES):
        return f"it has layers of type {', '.join(unsupported)}, which a tree mask over KV slots cannot serve"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention layers count their window in cache slots and ignore the given mask"
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        return "its ALiBi biases are taken from cache slots, not from the given positions"
    if getattr(config, "keep_window_size", None):
        return "in a long text it attends only to the strongest tokens, and its choice of equal ones depends on slots"
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa", GROUPED, BY_ROWS, BY_KERNEL, BY_KERNEL_ROWS):
        return f"attention {implementation!r} takes no 4-D mask; load it with attn_implementation='sdpa'"
    return None


def inexact_reason(model: PreTrainedModel) -> str | None:
    """Return why the result of a row may depend on the other rows of a forward, by a model's modules; None if nothing
    shows it."""
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention not in (BY_ROWS, BY_KERNEL_ROWS):
        return "its attention reads all rows together; load it with attn_implementation='sdpa'"
    if attention == BY_KERNEL_ROWS:  # the backend has looked at the modules
        return None
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | PackedLinear | Int8Linear | Int4Linear):
            continue
        if any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
            return f"{name} is a {type(module).__name__}, and no plain linear layer"
    return None


def missing_arguments(model: PreTrainedModel) -> str | None:
    """Return a message on the arguments that a model's forward lacks for decoding through slots; None if it has all."""
    parameters = inspect.signature(type(model).forward).parameters
    missing = [name for name in ("position_ids", "past_key_values") if name not in parameters]
    return f"its forward takes no {' and no '.join(missing)}" if missing else None


def mixed_rows_reason(model: PreTrainedModel) -> str | None:
    """Return a message if some layers compute a token's outputs also from other tokens of the forward; else None."""
    # Compared by name, as bitsandbytes may not be installed.
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return (
            "the 8-bit layers of bitsandbytes choose their outliers among all tokens of a forward, so a token's logits"
            " depend on those that are verified with it; load it with llm_int8_threshold=0.0, in 4 bits, or here with"
            " quantize='int8'"
        )
    return None
