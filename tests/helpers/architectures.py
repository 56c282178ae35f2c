"""The table of architectures: the model families that are decoded exactly, and the refused ones with the reason.

`python -m tests.helpers.architectures` writes the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers

from specdecode import LM, DraftTree, FixedK, ReplayDrafter, SinkWindow, UnsupportedModelError, generate, generate_batch
from specdecode.controllers.base import Limit
from specdecode.drafters.base import Context
from tests.helpers.families import EXAMPLES, FAMILIES, LEFT_OUT, WINDOW, build
from tests.helpers.models import continuation, prompt
from tests.helpers.root import ROOT

DOCUMENT = ROOT / "docs" / "architectures.md"
LENGTH = 24
# The parent of each node. The accepted nodes of the tree are not adjacent in the cache.
CHAIN = (0, 1, 2)
TREE = (0, 0, 0, 1, 1, 2, 4)


@dataclass
class Form:
    """A drafter that proposes trees of one fixed form. All its tokens are 0: the wrapping drafter replaces them."""

    parents: tuple[int, ...]
    forwards: int = 0
    layers: tuple[int, ...] = ()

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        return DraftTree(torch.zeros(len(self.parents), dtype=torch.long), torch.tensor(self.parents))


def row(family: str) -> str:
    """Return a family's line of the table: how its model is decoded, or why it is refused."""
    model = build(family)
    try:
        target = LM(model, name=model.config.model_type)
    except UnsupportedModelError as error:
        return _line(family, "refused", "", error)
    # The texts differ in length: a batch of equal lengths would not test padding.
    texts = [list(prompt()), list(prompt()[7:])]
    alone = [continuation(model, text, LENGTH) for text in texts]
    assert len(set(alone[0])) >= 8, f"{family} says nothing: {alone[0]}"
    drafters = [
        ReplayDrafter(Form(parents), [*text, *known], acceptance=0.6)
        for parents, text, known in zip((CHAIN, TREE), texts, alone, strict=True)
    ]
    results = [
        generate(target, text, drafter=drafter, controller=FixedK(3), max_new_tokens=LENGTH)
        for text, drafter in zip(texts, drafters, strict=True)
    ]
    results += generate_batch(
        target, texts, drafter=iter(drafters).__next__, controller=lambda: FixedK(3), max_new_tokens=LENGTH
    )
    for result, known in zip(results, 2 * alone, strict=True):
        assert result.tokens == known, f"{family} says {result.tokens}, but alone {known}"
        assert all(result.accepted_lengths), f"{family}: accepted {result.accepted_lengths}"
    try:
        return _line(family, "exact", _bounded(target, texts[0] + alone[0]))
    except UnsupportedModelError as error:
        return _line(family, "exact", "refused", error)


def _bounded(target: LM, text: list[int]) -> str:
    """Return how eviction treats the keys and values of the first layer.

    Only the first layer is compared: its keys and values depend on nothing but token and position.
    """
    rerotation, policy = target.rerotation, SinkWindow(24)
    slots, pruned = target.new_slots(len(text)), target.new_slots(len(text))
    target.forward(slots, torch.tensor(text))
    kept = policy.keep(slots)
    before = slots.filled_keys()[0][:, kept]
    rerotation.evict(slots, kept)
    after = slots.filled_keys()[0]
    target.forward(pruned, torch.tensor([text[i] for i in kept.tolist()]))
    if torch.allclose(after, pruned.filled_keys()[0], rtol=0, atol=1e-4):
        values = slots.filled_values()[0]
        assert torch.allclose(values, pruned.filled_values()[0], rtol=0, atol=1e-4), f"{target.name}: values lie wrong"
        return "served"
    assert torch.equal(after, before), f"{target.name}: re-rotated keys are not those of their new positions"
    return "served, keys as written"


def _line(family: str, decoding: str, bounded: str, error: UnsupportedModelError | None = None) -> str:
    # Cut off the model's name before the reason and the details of the run behind it.
    reason = str(error).partition(": ")[2].partition(" (")[0] if error else ""
    return f"| {family} | {EXAMPLES.get(family, '')} | {decoding} | {bounded} | {reason} |"


def document(rows: Sequence[str]) -> str:
    """Return the whole page: the given lines of the table and the text around them."""
    exact = sum(" | exact | " in line for line in rows)
    refused = len(rows) - exact
    table = "\n".join(rows)
    left_out = "\n".join(f"- {reason}: {', '.join(names)}" for reason, names in LEFT_OUT.items())
    return f"""\
# Architectures

The families of decoders in transformers {transformers.__version__}: {exact} are decoded exactly, {refused} are
refused, with the reason, when a model of theirs is wrapped.

Made by `python -m tests.helpers.architectures`; a test makes every row again. The models are tiny and of
random weights, with windows of {WINDOW} tokens if they have windows.

- *Exact*: {LENGTH} tokens are those of transformers' own `generate`, decoded with chains and with trees, alone and in a
  batch of two; of the drafts some are accepted and some rejected, in whole and in part.
- *Served*: the keys and values that stay when `SinkWindow` evicts tokens are those that the model writes for these
  tokens alone.
- *As written*: the model adds positions to its embeddings, so the keys that stay cannot be re-rotated; what is decoded
  later takes positions within the cache.
- *Refused* in the column `SinkWindow`: the model decodes, but no policy that evicts can be used.

The examples are for orientation; they were not run.

| family | such as | decoded | `SinkWindow` | reason |
|---|---|---|---|---|
{table}

## Left out

transformers can load these as causal models too:

{left_out}
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    DOCUMENT.write_text(document([row(family) for family in FAMILIES]))
