"""Tiny models that know texts by heart: as drafts they are right as far as their tokenizer allows."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from specdecode import LM
from tests.helpers.models import ARCHITECTURES, build


def learnt(tokenizer: PreTrainedTokenizerFast, *texts: str) -> LM:
    """Train a model that continues the beginnings of the texts. It takes about a second."""
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "initializer_range": 0.1}
    model = build(ARCHITECTURES["llama"] | shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = [torch.tensor([tokenizer(text)["input_ids"]], device=model.device) for text in texts]
    for _ in range(500):
        losses = [model(input_ids=tokens, labels=tokens, use_cache=False).loss for tokens in batch]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        if max(losses) < 0.02:
            return LM(model, tokenizer, name="learnt")
    raise AssertionError(f"not learnt: {losses}")
