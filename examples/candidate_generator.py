"""Your own candidate generator in transformers' `generate`, as an arm: `pytest --benchmark --preset
candidate_generator.toml`."""

import time

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import CandidateGenerator
from transformers.generation.streamers import BaseStreamer

from specdecode.bench.arms.callables import ArmStep


class LastOccurrence(CandidateGenerator):
    """Find the latest earlier occurrence of the last token, and propose the tokens that follow it there."""

    def __init__(self, count):
        self.count = count
        self.drafted = []

    def get_candidates(self, input_ids, **unused):
        tokens = input_ids[0].tolist()
        earlier = [place for place, token in enumerate(tokens[:-1]) if token == tokens[-1]]
        chain = tokens[earlier[-1] + 1 :][: self.count] if earlier else []
        self.drafted.append(len(chain))
        return torch.cat([input_ids, input_ids.new_tensor([chain])], dim=1) if chain else input_ids, None


class Clock(BaseStreamer):
    """Record the tokens as they arrive, with their times. The first call brings the prompt."""

    def __init__(self):
        self.started, self.came = time.perf_counter(), []

    def put(self, tokens):
        self.came.append((tokens.flatten().tolist(), time.perf_counter() - self.started))

    def end(self):
        pass


def make(target, draft, device, dtype, count):
    """Return the decoder of the arm `candidates`."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config.eos_token_id = None  # so that every output has the requested length

    def decode(prompt, max_new_tokens):
        ids, clock, candidates = torch.tensor([prompt], device=device), Clock(), LastOccurrence(count)
        # transformers accepts no candidate generator as an argument. Every assisted setting calls this method.
        model._get_candidate_generator = lambda **unused: candidates
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            prompt_lookup_num_tokens=count,
            streamer=clock,
        )
        for tokens, at_s in clock.came[1:]:
            yield ArmStep(tokens, at_s=at_s)

    return decode
