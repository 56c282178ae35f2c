"""transformers' `generate` with a static cache and `torch.compile`, as an arm: `pytest --benchmark --preset
compiled_generate.toml`. The peer `generate-compiled` does the same with modules that are already loaded."""

import torch
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

CACHE_TOKENS = 1024


def make(target, draft, device, dtype):
    """Return the decoder of the arm `compiled`."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config.eos_token_id = None  # so that every output has the requested length
    cache = StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
    config = CompileConfig(mode="default" if device == "cpu" else "reduce-overhead")
    config._compile_all_devices = True  # otherwise transformers compiles for GPUs only

    def decode(prompt, max_new_tokens):
        cache.reset()
        ids = torch.tensor([prompt], device=device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            past_key_values=cache,
            compile_config=config,
        )
        yield output[0, len(prompt) :].tolist()

    return decode
