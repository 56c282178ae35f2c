"""Linear layers with the same inputs, computed by one product."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from specdecode import LM, FixedK, PromptLookup, generate
from specdecode.backends.layouts import PLAIN
from specdecode.backends.merged import MergedPart, same_inputs
from specdecode.backends.packed import PackedLinear, pack
from specdecode.models.variants import shared_copy
from tests.helpers.models import ARCHITECTURES, build, prompt

QKV, GATED = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
# The layers of each block that read the same inputs. GPT-NeoX and Phi-3 store theirs merged, and GPT-2 and Falcon have
# one layer for each input.
GROUPS = {
    "llama": [QKV, GATED],
    "qwen3": [QKV, GATED],
    "gemma3-window": [QKV, GATED],
    "opt": [QKV],
    "phi": [QKV],
    "gpt-neox": [],
    "gpt-2": [],
    "phi3": [],
}


@pytest.mark.parametrize("name", GROUPS)
def test_layers_with_the_same_inputs_are_found(name: str) -> None:
    """Guards against layers that are merged though they read other inputs, and against some that are overlooked."""
    model = build(ARCHITECTURES[name]).cpu()
    groups = [sorted(names) for groups in same_inputs(model).values() for names in groups]
    layers = model.config.num_hidden_layers
    assert sorted(groups) == sorted(sorted(names) for names in GROUPS[name] for _ in range(layers))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_merged_layers_give_the_same_logits(name: str) -> None:
    """Guards against parts in the wrong order, a lost bias, and outputs of another input that a part gives."""
    plain = build(ARCHITECTURES[name]).cpu()
    for module in plain.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    merged, single = shared_copy(plain), shared_copy(plain)
    pack(single, PLAIN)
    groups = same_inputs(merged)
    pack(merged, PLAIN, groups)
    products = sum(isinstance(module, MergedPart) for module in merged.modules())
    assert products == sum(len(names) for of_module in groups.values() for names in of_module)
    with torch.no_grad():
        for length in (1, 2, 9):
            tokens = torch.tensor([list(prompt())[:length]])
            assert (merged(tokens).logits - plain(tokens).logits).abs().max() < 1e-10, length
    assert LM(merged).weight_bytes == LM(single).weight_bytes == LM(shared_copy(merged)).weight_bytes


def test_a_product_is_computed_once_for_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against merged layers that cost more products than before, and against inputs that stay in memory."""
    model = build(ARCHITECTURES["llama"]).cpu()
    pack(model, PLAIN, same_inputs(model))
    calls: list[nn.Module] = []
    monkeypatch.setattr(PackedLinear, "forward", _counted(PackedLinear.forward, calls))
    with torch.no_grad():
        model(torch.tensor([list(prompt())]))
    # Queries with keys and values, their output, the gated inputs and the output of the MLP; and the output head.
    assert len(calls) == 4 * model.config.num_hidden_layers + 1
    assert all(m._outputs.inputs is None and not m._outputs.parts for m in model.modules() if isinstance(m, MergedPart))


def _counted(forward, calls):  # type: ignore[no-untyped-def]
    def counting(layer: nn.Module, inputs: Tensor) -> Tensor:
        calls.append(layer)
        return forward(layer, inputs)

    return counting


class Pair(nn.Module):
    """Two layers and what a forward does between them."""

    def __init__(self, between: str, bias: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.a, self.b = (nn.Linear(8, 8, one) for one in bias)
        self.between = between

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embedding(input_ids)
        a = self.a(x)
        if self.between == "write":
            x.mul_(2.0)
        elif self.between == "copy":
            x = x.clone()
        elif self.between == "again":
            a = a + self.a(x)
        elif self.between == "fail":
            raise ValueError("no forward")
        return a * self.b(x)


@pytest.mark.parametrize("between", ["", "write", "copy", "again", "fail", "bias"])
def test_only_the_same_unchanged_inputs_are_merged(between: str) -> None:
    """Guards against a merged layer that does not see what was written into its inputs since the first layer."""
    pair = Pair(between, (True, between != "bias"))
    assert list(same_inputs(pair).values()) == ([] if between else [[["a", "b"]]])


def test_a_part_with_other_inputs_computes_its_own_output() -> None:
    """Guards against a model whose forwards are not all like the one that was looked at."""
    pair = Pair("")
    plain = copy.deepcopy(pair)
    pack(pair, PLAIN, same_inputs(pair))
    first, second = torch.randn(2, 3, 8)
    pair.a(first)  # nobody takes the other output
    assert torch.allclose(pair.b(second), plain.b(second), atol=1e-6)
    assert torch.allclose(pair.b(first), plain.b(first), atol=1e-6)
    tokens = torch.tensor([[1, 2]])
    assert torch.allclose(pair(tokens), plain(tokens), atol=1e-6)


def test_speculation_over_merged_layers_is_plain_decoding() -> None:
    """Guards against outputs that one forward leaves for the next."""
    model = build(ARCHITECTURES["llama"]).cpu()
    pack(model, PLAIN, same_inputs(model))
    target = LM(model)
    expected = generate(target, prompt(), max_new_tokens=40).tokens
    drafted = generate(target, prompt(), drafter=PromptLookup(), controller=FixedK(5), max_new_tokens=40)
    assert drafted.tokens == expected
    assert drafted.target_forwards < 40
