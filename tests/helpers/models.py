"""Tiny random models in float64, and their outputs without this package. Each of their tokens is a character.

No decision of theirs is so close that rounding could change it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from specdecode import LM
from tests.helpers.spelling import CHARACTERS, characters

VOCABULARY = len(CHARACTERS)
# With this seed every architecture below has diverse outputs. With others, some loop at once.
SEED = 2
# The models' device: `pytest --device cuda` puts them on a GPU.
DEVICE = "cpu"
WINDOW = 8

_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = _IDS | {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    # With the default of 0.02 every output is a loop of one token, and proves nothing.
    "initializer_range": 0.4,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_FALCON = _IDS | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.4}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | {"model_type": "llama"},
    "gpt-neox": _PLAIN
    | {
        "model_type": "gpt_neox",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
    "gpt-2": _IDS
    | {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "initializer_range": 0.4},
    "opt": _IDS
    | {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 512,
        "init_std": 0.4,
    },
    "qwen2": _GROUPED | {"model_type": "qwen2"},
    "qwen2-window": _GROUPED
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": _GROUPED | {"model_type": "qwen3", "head_dim": 8},
    "mistral-window": _GROUPED | {"model_type": "mistral", "sliding_window": WINDOW},
    "gemma2-window": _GROUPED
    | {"model_type": "gemma2", "head_dim": 8, "sliding_window": WINDOW, "tie_word_embeddings": False},
    "gemma3-window": _GROUPED
    | {
        "tie_word_embeddings": False,
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi": _PLAIN | {"model_type": "phi"},
    "phi3": _GROUPED | {"model_type": "phi3"},
    "falcon": _FALCON | {"model_type": "falcon", "alibi": False},
    "stablelm": _GROUPED | {"model_type": "stablelm"},
    "olmo2": _GROUPED | {"model_type": "olmo2"},
    "granite": _GROUPED | {"model_type": "granite"},
}

# Architectures that every policy can serve: one of each kind of positions, head groups and windows.
SERVED = ("llama", "gpt-neox", "qwen2", "qwen3", "gpt-2", "gemma3-window")

# Their forwards index by a list, which copies the list to the device. A capture allows no such copy.
UNCAPTURED = {"falcon"}

# Architectures that the package cannot serve, and a word that the reason must contain.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (_IDS | {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, "takes no position_ids"),
    "mamba": (_IDS | {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, "linear_attention"),
    "gpt-neo": (
        _IDS
        | {
            "model_type": "gpt_neo",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
        "local attention",
    ),
    "mpt": (_IDS | {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi"),
    "falcon-alibi": (_FALCON | {"model_type": "falcon", "alibi": True}, "ALiBi"),
}


def config(values: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**values)


def build(values: dict[str, Any], seed: int = SEED) -> PreTrainedModel:
    """Build a model of random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(values), dtype=torch.float64).eval()
    return moved(model, DEVICE)


def moved(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Move a model to a device. On a pretended device, each name gets a tensor of its own, tied ones too."""
    model.to(device)
    model.tie_weights()
    return model


@functools.cache
def lm(name: str, seed: int = SEED) -> LM:
    return LM(build(ARCHITECTURES[name], seed), characters(), name=name)


def small(seed: int = SEED, **values: Any) -> LM:
    """Build the smallest useful Llama, for tests that enumerate its outputs or call it thousands of times."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LM(build(ARCHITECTURES["llama"] | {"intermediate_size": 8} | shape | values, seed), name="small")


@functools.cache
def quantisable(name: str) -> dict[str, Any]:
    """Return a tiny architecture with layers as wide as groups of 4-bit weights need."""
    widths = {"intermediate_size": 64, "ffn_dim": 96}
    return ARCHITECTURES[name] | {key: width for key, width in widths.items() if key in ARCHITECTURES[name]}


def prompt(length: int = 14) -> tuple[int, ...]:
    """Return a prompt that begins with a passage said twice, so that prompt lookup finds something."""
    passage = [(29 * i + 11) % VOCABULARY for i in range(max(length // 2, 1))]
    return tuple((passage + passage + passage)[:length])


@functools.cache
def greedy(name: str, length: int, text: tuple[int, ...] | None = None) -> list[int]:
    """Return the continuation by transformers' own `generate`, with its own cache."""
    return continuation(lm(name).model, text or prompt(), length)


def continuation(model: PreTrainedModel, text: Sequence[int], length: int) -> list[int]:
    ids = torch.tensor([list(text)], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(text) :].tolist()


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int] | None = None) -> torch.Tensor:
    """Compute the logits after each token of a text, by one causal forward without a cache. [n, V]"""
    count = len(tokens)
    device = model.device
    hidden = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros_like(hidden, dtype=model.dtype).masked_fill(hidden, torch.finfo(model.dtype).min)
    return model(
        input_ids=torch.tensor([list(tokens)], device=device),
        position_ids=torch.tensor([list(range(count) if positions is None else positions)], device=device),
        attention_mask=mask[None, None],
        use_cache=False,
    ).logits[0]
