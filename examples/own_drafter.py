"""Your own drafter in this package's loop, as an arm: `pytest --benchmark --preset own_drafter.toml`."""

import itertools
import time

import torch

import specdecode
from specdecode.bench.arms.callables import ArmStep


class Bigrams:
    """Propose, after each token, the token that followed its latest occurrence in this text."""

    forwards = 0  # forwards of a draft model: there is none
    layers = ()  # layers of the target whose hidden states the drafter reads: none

    def __init__(self):
        self.following = {}

    def propose(self, context, limit):
        tokens = list(context.tokens)
        self.following.update(itertools.pairwise(tokens))
        chain, last = [], tokens[-1]
        while len(chain) < min(limit.depth, limit.nodes) and last in self.following:
            last = self.following[last]
            chain.append(last)
        # Node 0 is the last token of the text. The parent of each proposal is the proposal before it.
        return specdecode.DraftTree(torch.tensor(chain, dtype=torch.long), torch.arange(len(chain)))


def make(target, draft, device, dtype, k):
    """Return the decoder of the arm `bigrams`."""
    model = specdecode.load(target, device=device, dtype=dtype)

    def decode(prompt, max_new_tokens):
        started, came = time.perf_counter(), []
        result = specdecode.generate(
            model,
            prompt,
            drafter=Bigrams(),
            controller=specdecode.FixedK(k),
            max_new_tokens=max_new_tokens,
            on_step=lambda tokens: came.append((tokens, time.perf_counter() - started)),
        )
        for step, (tokens, at_s) in zip(result.steps, came, strict=True):
            yield ArmStep(
                tokens,
                drafted=step.drafted,
                accepted=step.accepted,
                draft_s=step.draft_s,
                verify_s=step.verify_s,
                cache_bytes=step.cache_bytes,
                at_s=at_s,
            )

    return decode
