"""The lean Llama of the tests is transformers' Llama."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from specdecode import LM, DraftTree
from tests.helpers.lean import lean
from tests.helpers.models import prompt, small


@pytest.mark.parametrize("values", [{}, {"num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 16}])
def test_it_computes_the_same_bits(values: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against tests of another model than they name."""
    plain = small(**values)
    ours = lean(LM(copy.deepcopy(plain.model)))

    def read(target: LM) -> torch.Tensor:
        slots = target.new_slots(32)
        before, _ = target.read(slots, prompt())
        tree = DraftTree(torch.tensor([3, 4, 5, 6]), torch.tensor([0, 0, 1, 2]))
        return torch.cat([before, target.forward_tree(slots, [7, 8], tree)])

    expected = read(plain)
    monkeypatch.delattr(LlamaForCausalLM, "forward")
    assert torch.equal(read(ours), expected)
