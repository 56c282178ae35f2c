"""Logits that must be the same to the last bit, however many tokens are read at once."""

from __future__ import annotations

import torch

from specdecode import LM, DraftTree
from tests.helpers.models import prompt


def one_by_one(model: LM, text: list[int], tree: DraftTree) -> list[torch.Tensor]:
    """Logits after a text and after each node of a tree behind it, where each token is read alone behind a beginning
    that is read at once. The nodes of a path are read once: the slots then go back to the parent for the next branch.
    """
    slots = model.new_slots(4)
    model.forward(slots, torch.tensor(text[:10]))
    logits = [torch.empty(0)] * (len(tree.tokens) + 1)
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()

    def read(node: int, given: list[int]) -> None:
        for token in given:
            logits[node] = model.forward(slots, torch.tensor([token]))[-1]
        length = slots.length
        for child, (parent, token) in enumerate(zip(parents, tokens, strict=True), start=1):
            if parent == node:
                slots.keep([], after=length)
                read(child, [token])

    read(0, text[10:])
    return logits


def off(model: LM, tree: DraftTree) -> list[int]:
    """The nodes of a tree whose logits are not, to the last bit, those of plain decoding."""
    text = list(prompt(11))
    slots = model.new_slots(4)
    model.forward(slots, torch.tensor(text[:10]))
    logits = model.forward_tree(slots, text[10:], tree)
    alone = one_by_one(model, text, tree)
    return [node for node, expected in enumerate(alone) if not torch.equal(logits[node], expected)]
