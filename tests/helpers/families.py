"""The decoder families of transformers: a tiny configuration of each, or the reason why there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.helpers import models

# Wider than the probe of `LM`, and narrower than the texts here: a window that is ignored shows as a wrong token.
WINDOW = 20

# Fields of most configurations. A family gets the ones that its configuration has.
_SHARED: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    # With the default of 0.02 every output is a loop of one token, and proves nothing.
    "initializer_range": 0.4,
    "init_std": 0.4,
    "tie_word_embeddings": False,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    # Latent attention: the keys are wider than the values.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
    # Recurrent layers.
    "mamba_d_state": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LATENT = {"num_key_value_heads": 4}
_WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}
_RECURRENT = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
# Later layers use the keys of earlier ones.
_SHARING = {"num_hidden_layers": 4, "layer_types": 2 * _WINDOW["layer_types"], "num_kv_shared_layers": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BYTES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}

# The particular fields of each family. A word behind the name distinguishes variants of a family.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _WINDOW,
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT | _RECURRENT,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "beam": _WINDOW,
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "blt": {
        "encoder_config": _BYTES | {"hidden_size_global": 32},
        "decoder_config": _BYTES | {"hidden_size_global": 32},
        "global_config": _BYTES | {"hidden_size": 32},
        "patcher_config": _BYTES,
        "encoder_hash_byte_group_vocab": 50,
    },
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "cohere2": _WINDOW,
    "cohere2_moe": _WINDOW,
    "cohere_compass_text": _WINDOW | {"rope_parameters": dict.fromkeys(_WINDOW["layer_types"], _ROPE)},
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "ctrl": {"dff": 48},
    "cwm": _WINDOW,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": _LATENT,
    "diffllama": {},
    "doge": {},
    "dots1": _WINDOW | {"n_shared_experts": 1},
    "dots3_note_text": _LATENT,
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": _WINDOW,
    "exaone_moe": _WINDOW,
    "falcon": {"alibi": False},
    "falcon (ALiBi)": {"alibi": True},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "falcon_mamba": {},
    "flex_olmo": {},
    "flint": _WINDOW,
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3": {
        "text_config": {
            "vocab_size": models.VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "initializer_range": 0.4,
            "sliding_window": WINDOW,
        }
        | _WINDOW,
        "vision_config": {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "image_size": 28,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3_text": _WINDOW,
    "gemma3n_text": _SHARING
    | {"vocab_size_per_layer_input": models.VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    "gemma4_text": _SHARING
    | {"vocab_size_per_layer_input": models.VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "gemma4_unified_text": _WINDOW | {"global_head_dim": 16, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": _WINDOW,
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granite_swa": _WINDOW,
    "granitemoe": {},
    "granitemoe_swa": _WINDOW,
    "granitemoehybrid": _RECURRENT | {"shared_intermediate_size": 16, "mamba_n_heads": 8},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "helium": {},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": _LATENT,
    "hyperclovax": {},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 64},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 64},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {},
    "kimi_linear": _LATENT | _RECURRENT | {"linear_head_dim": 8, "linear_num_heads": 4},
    "kolibri1": _WINDOW,
    "laguna": _WINDOW,
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "lfm3": _CONVOLUTION,
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"]},
    "longcat_flash": _LATENT
    | {"num_layers": 1, "zero_expert_num": 2, "ffn_hidden_size": 48, "moe_topk": 2}
    | {"expert_ffn_hidden_size": 16},
    "mamba": {},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "mellum": _WINDOW,
    "mimo_v2_flash": _WINDOW,
    "minicpm3": _LATENT,
    "minimax": _RECURRENT,
    "minimax_m2": {},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": _WINDOW,
    "ministral3": {
        "rope_parameters": _ROPE
        | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
    },
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": _WINDOW | {"local_attention": 2 * WINDOW},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    # The older field names, which every version knows.
    "nemotron_h": {
        "layer_types": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": _WINDOW,
    "qwen2_moe": _WINDOW,
    "qwen3": _WINDOW,
    "qwen3_5_moe_text": _RECURRENT,
    "qwen3_5_text": _RECURRENT,
    "qwen3_moe": {},
    "qwen3_next": _RECURRENT,
    "qwen4_exp_text": _RECURRENT
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": models.VOCABULARY,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48,
        "local_attn_chunk_length": 8,
    },
    "rwkv": {},
    "seed_oss": {},
    "smollm3": _WINDOW | {"no_rope_layers": [1, 0]},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": _WINDOW,
    "xglm": {"ffn_dim": 48},
    "xlm": {},
    "xlnet": {"d_inner": 48, "d_head": 8},
    "xlstm": {"num_heads": 4},
    "youtu": _LATENT,
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

# Families left out by reason. transformers can load these as causal models too.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "the decoder of an encoder-decoder": (
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "trocr",
        "whisper",
    ),
    "an encoder, which a setting makes a decoder": (
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ),
    "reads pictures beside the text; the text's own decoder is a row of the table, or has no name": (
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "git",
        "got_ocr2",
        "llama4",
        "mllama",
        "phi4_multimodal",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
    ),
    "reads or writes sound": ("moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody"),
    "drafts for another model, from that one's states": ("gemma4_assistant", "gemma4_unified_assistant"),
}

# Well-known models of the families.
EXAMPLES = {
    "biogpt": "microsoft/biogpt",
    "bloom": "bigscience/bloom-560m",
    "codegen": "Salesforce/codegen-350M-mono",
    "cohere": "CohereLabs/c4ai-command-r-v01",
    "cohere2": "CohereLabs/c4ai-command-r7b-12-2024",
    "ctrl": "Salesforce/ctrl",
    "dbrx": "databricks/dbrx-instruct",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek_v3": "deepseek-ai/DeepSeek-V3, deepseek-ai/DeepSeek-R1",
    "deepseek_v32": "deepseek-ai/DeepSeek-V3.2-Exp",
    "ernie4_5": "baidu/ERNIE-4.5-0.3B-PT",
    "exaone4": "LGAI-EXAONE/EXAONE-4.0-32B",
    "falcon": "tiiuae/falcon-7b",
    "falcon (ALiBi)": "tiiuae/falcon-rw-1b",
    "falcon_h1": "tiiuae/Falcon-H1-0.5B-Base",
    "falcon_mamba": "tiiuae/falcon-mamba-7b",
    "gemma": "google/gemma-2b",
    "gemma2": "google/gemma-2-2b",
    "gemma3": "google/gemma-3-4b-it",
    "gemma3_text": "google/gemma-3-1b-it",
    "glm4": "zai-org/GLM-4-9B-0414",
    "glm4_moe": "zai-org/GLM-4.5-Air",
    "gpt2": "openai-community/gpt2",
    "gpt_bigcode": "bigcode/starcoder",
    "gpt_neo": "EleutherAI/gpt-neo-125m",
    "gpt_neox": "EleutherAI/pythia-70m, EleutherAI/gpt-neox-20b",
    "gpt_oss": "openai/gpt-oss-20b",
    "gptj": "EleutherAI/gpt-j-6b",
    "granite": "ibm-granite/granite-3.3-2b-instruct",
    "granitemoe": "ibm-granite/granite-3.0-1b-a400m-base",
    "helium": "kyutai/helium-1-2b",
    "jamba": "ai21labs/Jamba-v0.1",
    "lfm2": "LiquidAI/LFM2-350M",
    "llama": "meta-llama/Llama-3.2-1B, HuggingFaceTB/SmolLM2-135M-Instruct, TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "llama4_text": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "mamba": "state-spaces/mamba-130m-hf",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "mpt": "mosaicml/mpt-7b",
    "nanochat": "karpathy/nanochat-d32",
    "nemotron": "nvidia/Minitron-4B-Base",
    "olmo": "allenai/OLMo-1B-hf",
    "olmo2": "allenai/OLMo-2-0425-1B",
    "olmo3": "allenai/Olmo-3-7B-Instruct",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "openai-gpt": "openai-community/openai-gpt",
    "opt": "facebook/opt-125m",
    "persimmon": "adept/persimmon-8b-base",
    "phi": "microsoft/phi-2",
    "phi3": "microsoft/Phi-3-mini-4k-instruct, microsoft/phi-4",
    "phimoe": "microsoft/Phi-3.5-MoE-instruct",
    "qwen2": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "recurrent_gemma": "google/recurrentgemma-2b",
    "rwkv": "RWKV/rwkv-4-169m-pile",
    "seed_oss": "ByteDance-Seed/Seed-OSS-36B-Instruct",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "stablelm": "stabilityai/stablelm-2-1_6b",
    "starcoder2": "bigcode/starcoder2-3b",
    "xglm": "facebook/xglm-564M",
    "zamba2": "Zyphra/Zamba2-1.2B",
}

# Families whose output with the shared seed is a loop of a few tokens.
_SEEDS = {
    "apertus": 4,
    "exaone4": 0,
    "gemma2": 1,
    "gpt_bigcode": 3,
    "kolibri1": 0,
    "longcat_flash": 0,
    "persimmon": 3,
    "phi": 0,
    "qwen3": 0,
}
# Families whose code cannot compute in float64.
_FLOAT32 = {"xglm"}


def model_type(family: str) -> str:
    """Return transformers' name of a family."""
    return family.partition(" ")[0]


def build(family: str) -> PreTrainedModel:
    """Build a model of random weights, the same at every call."""
    configuration = CONFIG_MAPPING[model_type(family)]
    names = {field.name for field in dataclasses.fields(configuration)} | set(configuration.attribute_map)
    shared = {name: value for name, value in _SHARED.items() if name in names}
    config = configuration(**shared | FAMILIES[family])
    dtype = torch.float32 if family in _FLOAT32 else torch.float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEEDS.get(family, models.SEED))
        # The usual implementation of experts cannot compute in float64.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
        # Norms start as ones and biases as zeros. Left so, a wrong place of either would change no output.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn(parameter.shape, dtype=dtype), alpha=0.1)
    return model.to(models.DEVICE)
