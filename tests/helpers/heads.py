"""Folders of draft heads, and of checkpoints with MTP layers, for code that loads them by name."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, modeling_layers

from specdecode import LM
from specdecode.heads.bound import output_rows, untrained
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import write_eagle3
from specdecode.heads.fingerprint import target_fingerprint
from tests.helpers.models import VOCABULARY, WINDOW, config
from tests.helpers.spelling import characters

MEDUSA_HEADS, MEDUSA_BLOCKS, WIDTH = 3, 2, 32
MTP_LAYERS = 3

HAS_MTP = hasattr(modeling_layers, "MtpModel")
"""Whether transformers loads MTP layers. Its versions for Python 3.10 do not."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": MTP_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MTP_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {"head_dim": 8},
    "mellum": {
        "head_dim": 8,
        "num_experts": 4,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
# Names of the MTP layer's own tensors in DeepSeek's checkpoints, and the names in Mellum's.
_MTP_TENSORS = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "shared_head.norm": "norm",
    "eh_proj": "fc",
}


def write_head(target: LM, folder: Path, head: Eagle3Head | None = None, *, shared_output: bool = False) -> Path:
    """Write a head, by default one of random weights, and return its folder."""
    head = head or untrained(target)
    rows = None if shared_output else output_rows(target, head.tokens)
    folder = folder / "head"
    write_eagle3(
        folder, head, rows, target_fingerprint(target), [type(target.model).__name__], {"seed": 7}, "# A head\n"
    )
    return folder


def write_medusa(folder: Path, *, prefix: str = "", name: str = "medusa_lm_head.safetensors") -> dict[str, Tensor]:
    """Write Medusa heads of random weights under the names of published heads, and return the weights."""
    mixer = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for head, block in product(range(MEDUSA_HEADS), range(MEDUSA_BLOCKS)):
        tensors[f"{head}.{block}.linear.weight"] = 0.3 * torch.randn(WIDTH, WIDTH, generator=mixer)
        tensors[f"{head}.{block}.linear.bias"] = torch.randn(WIDTH, generator=mixer)
    for head in range(MEDUSA_HEADS):
        tensors[f"{head}.{MEDUSA_BLOCKS}.weight"] = torch.randn(VOCABULARY, WIDTH, generator=mixer)
    named = {f"{prefix}{key}": value for key, value in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(named, folder / name)
    else:
        torch.save(named, folder / name)
    config = {
        "medusa_num_heads": MEDUSA_HEADS,
        "medusa_num_layers": MEDUSA_BLOCKS,
        "base_model_name_or_path": "a/model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def write_mtp(family: str, folder: Path) -> Path:
    """Write a model with an MTP layer and a tokenizer, and return its folder.

    The tensors have the names of the family's own checkpoints. The MTP layer stands behind the last layer. The test is
    skipped if transformers cannot load it.
    """
    if not HAS_MTP:
        pytest.skip(f"transformers loads MTP layers from 5.23 on, and this is {transformers.__version__}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        values = _COMMON | MTP_FAMILIES[family] | {"model_type": family}
        model = AutoModelForCausalLM.from_config(config(values), dtype=torch.float64)
        # Its last layer becomes the MTP layer of a model that has one layer less.
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        layer = f"model.layers.{MTP_LAYERS - 1}."
        joining = {name: torch.rand(32).double() + 0.5 for name in list(_MTP_TENSORS)[:-1]}
        joining["eh_proj"] = 0.3 * torch.randn(32, 64).double()
    if family == "mellum":
        tensors = {name.replace(layer, "mtp.layers.0."): x for name, x in tensors.items()}
        tensors |= {f"mtp.{_MTP_TENSORS[name]}.weight": x for name, x in joining.items()}
    else:
        tensors |= {f"{layer}{name}.weight": x for name, x in joining.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    by_layer = {key: stored[key][:-1] for key in ("layer_types", "mlp_layer_types") if stored.get(key)}
    stored |= by_layer | {"num_hidden_layers": MTP_LAYERS - 1}
    (folder / "config.json").write_text(json.dumps(stored))
    characters().save_pretrained(folder)
    return folder
