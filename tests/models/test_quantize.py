from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from specdecode import (
    LM,
    FixedK,
    Generation,
    ModelDrafter,
    PromptLookup,
    ReplayDrafter,
    generate,
    load,
)
from specdecode.bench.measure.bandwidth import roofline_throughput
from specdecode.bench.measure.check import classify
from specdecode.core.errors import UnsupportedModelError
from specdecode.models.architectures import SHAPES
from specdecode.models.quantize import quantizer
from tests.helpers.discovery import DRAFTERS, POLICIES, examples
from tests.helpers.models import ARCHITECTURES, build, continuation, greedy, lm, logits, prompt, small

LENGTH = 40
NAMES = ("llama", "gpt-neox", "opt", "phi3", "mistral-window")


@functools.cache
def int8(name: str) -> LM:
    return lm(name).quantized("int8")


@functools.cache
def alone(name: str, policy: str = "keep-all") -> Generation:
    """Autoregressive decoding of the quantised model."""
    return generate(int8(name), prompt(), policy=POLICIES[policy], max_new_tokens=LENGTH)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """What is to be quantised, in order: not a head that is tied."""
    embedding = model.get_input_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not embedding.weight]


def scales(weight: torch.Tensor) -> torch.Tensor:
    """One for each output channel: the range of 255 integers over twice the largest magnitude. [out, 1]"""
    return weight.float().abs().amax(1, keepdim=True) / 127.5


@functools.cache
def replaced(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """The unquantised model with other weights in the place of those that are quantised."""
    model = build(ARCHITECTURES[name])
    with torch.no_grad():
        for layer in linear_layers(model):
            layer.weight.copy_(by(layer.weight))
    return model


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What INT8 makes of a weight, by hand."""
    scale = scales(weight)
    return (weight.float() * (1 / scale)).round().clamp(-128, 127).double() * scale.double()


def jittered(weight: torch.Tensor) -> torch.Tensor:
    """A weight with noise of the size that rounding to INT8 has."""
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel()), dtype=torch.float64)
    return weight + (noise - 0.5).to(weight) * scales(weight)


# What is computed.


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_that_of_the_rounded_weights(name: str) -> None:
    """Guards against scales of the wrong axis, layers that are left out, and a cache that quantised layers spoil.

    The reference is transformers' own decoding, of weights that were rounded without torchao.
    """
    text = [*prompt(), *alone(name).tokens]
    expected = logits(replaced(name, rounded), text)
    assert torch.allclose(logits(int8(name).model, text), expected, rtol=1e-9, atol=1e-9 * expected.std().item())
    assert alone(name).tokens == continuation(replaced(name, rounded), prompt(), LENGTH)
    assert len(set(alone(name).tokens)) > 10


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_of_the_size_of_eight_bits(name: str) -> None:
    """Guards against weights that were not quantised at all, and against fewer bits than are named."""
    full, error = build(ARCHITECTURES[name]), 0.0
    for layer, rough in zip(linear_layers(full), linear_layers(int8(name).model), strict=True):
        off = (rough(torch.eye(layer.in_features, dtype=torch.float64).to(layer.weight)) - 0).T
        off = (off if layer.bias is None else off - layer.bias[:, None]) - layer.weight
        assert (off.abs() <= 0.5001 * scales(layer.weight)).all()
        error = max(error, (off.abs() / scales(layer.weight)).max().item())
    assert error > 0.45
    text = prompt(40)
    exact = logits(full, text)
    of_int8, of_noise = (
        (logits(other, text) - exact).std().item() for other in (int8(name).model, replaced(name, jittered))
    )
    assert of_noise / 3 < of_int8 < 3 * of_noise


# Speculation.


@settings(max_examples=30)
@given(
    name=st.sampled_from(NAMES),
    policy=st.sampled_from(sorted(POLICIES)),
    file=st.sampled_from(sorted(DRAFTERS)),
    k=st.integers(1, 9),
    data=st.data(),
)
def test_the_tokens_are_those_of_the_quantised_model_alone(
    name: str, policy: str, file: str, k: int, data: st.DataObject
) -> None:
    """Guards against a product that depends on how many rows it has, and a draft that has a say in the tokens."""
    drafters = examples(file, int8(name)) | {"unquantised": ModelDrafter(lm(name).subset([0, 1, 3]))}
    drafter = drafters[data.draw(st.sampled_from(sorted(drafters)))]
    kept = POLICIES[policy]
    result = generate(int8(name), prompt(), drafter=drafter, controller=FixedK(k), policy=kept, max_new_tokens=LENGTH)
    assert result.tokens == alone(name, policy).tokens


def test_drafts_are_accepted_and_rejected_and_the_weights_change_the_text() -> None:
    """Guards against a comparison in which nothing was drafted, all of it was wrong, or INT8 changed nothing."""
    assert [name for name in NAMES if alone(name).tokens == greedy(name, LENGTH)] == []
    drafter = ModelDrafter(lm("llama").subset([0, 1, 3]))
    replayed = ReplayDrafter(drafter, [*prompt(), *alone("llama").tokens], acceptance=0.7)
    result = generate(int8("llama"), prompt(), drafter=replayed, max_new_tokens=LENGTH)
    assert result.tokens == alone("llama").tokens
    assert {step.accepted for step in result.steps} >= {0, 1, 2}


def test_in_float32_no_token_is_wrong() -> None:
    """Guards against one row and several that differ by more than the rounding of the type."""
    target = LM(build(ARCHITECTURES["llama"]).float()).quantized("int8")
    assert target.dtype == torch.float32
    for text in (prompt(9), prompt(30)):
        expected = generate(target, text, max_new_tokens=30).tokens
        for drafter in (ModelDrafter(lm("llama").subset([0, 1, 3])), PromptLookup()):
            got = generate(target, text, drafter=drafter, max_new_tokens=30).tokens
            assert classify(target, text, expected, got) != "bug"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_stay_within_the_type(dtype: torch.dtype) -> None:
    """Guards against infinities on the way: the product with the integers is by 250 larger than the one with weights.

    Large activations before a layer of small weights are what real models have.
    """
    layer = nn.Sequential(nn.Linear(64, 8)).to(dtype)
    with torch.no_grad():
        layer[0].weight.uniform_(0.2, 0.5)
    x = torch.full((3, 64), 30.0, dtype=dtype)
    expected = layer(x)
    quantizer("int8")(layer)
    assert torch.allclose(layer(x), expected, rtol=0.01)


# What stays as it was.


def test_quantising_leaves_the_model_alone_and_shares_the_rest() -> None:
    """Guards against a target that is changed under the arms that decode it as it is, and a second copy of it all."""
    target = small(vocab_size=31)
    before, size = logits(target.model, range(20)), target.weight_bytes
    rough = target.quantized("int8")
    assert rough is target.quantized("int8")
    assert torch.equal(logits(target.model, range(20)), before)
    assert target.weight_bytes == size
    assert rough.model.get_input_embeddings().weight is target.model.get_input_embeddings().weight
    assert not torch.equal(logits(rough.model, range(20)), before)
    assert rough.name == "small (int8)"


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_layers_of_a_quantised_target_are_a_quantised_draft(name: str) -> None:
    """Guards against a subset that loses the scales, or shares another layer's."""
    text = prompt(30)
    draft, other = int8(name).subset([0, 2]), lm(name).subset([0, 2]).quantized("int8")
    assert torch.equal(logits(draft.model, text), logits(other.model, text))
    result = generate(int8(name), prompt(), drafter=ModelDrafter(draft), max_new_tokens=LENGTH)
    assert result.tokens == alone(name).tokens
    assert load("layers:0,2", target=int8(name)).weight_bytes == draft.weight_bytes


def test_a_head_that_is_tied_stays_with_its_embedding() -> None:
    """Guards against a vocabulary that is stored twice, and against a tie that is torn without a word."""
    tied = LM(build(ARCHITECTURES["llama"] | {"tie_word_embeddings": True})).quantized("int8").model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert tied.get_output_embeddings().weight.nbytes == 97 * 32 * 8
    own = int8("llama").model
    assert type(own.get_output_embeddings().weight).__name__ == "Int8Tensor"
    assert type(own.get_input_embeddings().weight) is nn.Parameter


# Memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [True, False])
def test_weights_are_counted_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ties: bool
) -> None:
    """Guards against the bytes that a quantised tensor stands for, scales forgotten, and a tied head counted twice."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40, "tie_word_embeddings": ties}
    shape |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    target = LM(build(ARCHITECTURES["llama"] | shape).to(dtype))
    # Outputs and inputs of each linear layer: queries, keys, values, back; up, gate, down.
    layers = [(24, 24), (8, 24), (8, 24), (24, 24), (40, 24), (40, 24), (24, 40)] * 2 + [(97, 24)] * (not ties)
    weights, channels = sum(a * b for a, b in layers), sum(a for a, _ in layers)
    rest = (97 * 24 + 5 * 24) * dtype.itemsize  # the embedding, and two norms a layer and one at the end
    assert target.weight_bytes == weights * dtype.itemsize + rest
    # A byte a weight, and a scale of four and a zero point of one a channel.
    rough = target.quantized("int8")
    assert rough.weight_bytes == weights + 5 * channels + rest
    monkeypatch.setattr("specdecode.bench.measure.bandwidth.copy_bandwidth", lambda device: 1e9)
    unread = 0 if ties else 97 * 24 * dtype.itemsize
    assert roofline_throughput(rough) == pytest.approx(1e9 / (rough.weight_bytes - unread))


# Loading, and what cannot be quantised.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_is_loaded_quantised(monkeypatch: pytest.MonkeyPatch, tmp_path: object, dtype: torch.dtype) -> None:
    """Guards against an option that is read and forgotten, for folders and for shapes."""
    lm("llama").model.save_pretrained(tmp_path)
    expected = load(str(tmp_path), dtype=dtype, device="cpu").quantized("int8")
    loaded = load(str(tmp_path), dtype=dtype, device="cpu", quantize="int8")
    assert torch.equal(logits(loaded.model, prompt()), logits(expected.model, prompt()))
    assert loaded.weight_bytes == expected.weight_bytes
    assert loaded.name == f"{tmp_path} (int8)"
    monkeypatch.setitem(SHAPES, "tiny", ARCHITECTURES["llama"])
    shape = load("shape:tiny", dtype=dtype, device="cpu", quantize="int8")
    assert shape.weight_bytes == expected.weight_bytes
    assert shape.synthetic


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("./nowhere", {"quantize": "int4"}, "quantize is 'int4': weights are quantised to 'int8' only"),
        ("./nowhere", {"quantize": "INT8"}, "quantize is 'INT8'"),
        ("layers:0", {"quantize": "int8"}, "'layers:0' shares the weights of its target"),
    ],
)
def test_what_cannot_be_loaded_quantised_is_reported_before_anything_is_read(
    name: str, options: dict[str, str], sentence: str
) -> None:
    """Guards against minutes of loading before a misspelt option is told, and against one that is ignored."""
    with pytest.raises(ValueError, match=sentence):
        load(name, target=lm("llama"), **options)


def test_without_torchao_the_way_to_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback where an optional package is missing."""
    for module in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"INT8 weights need torchao .*: pip install torchao"):
        load("./nowhere", quantize="int8")


@pytest.mark.parametrize(
    ("name", "layer"), [("gpt-2", "transformer.h.0.attn.c_attn is a Conv1D"), ("falcon", "a FalconLinear")]
)
def test_weights_that_would_stay_as_they_are_are_refused(name: str, layer: str) -> None:
    """Guards against a model that is called INT8 and is not."""
    model = build(ARCHITECTURES[name])
    with pytest.raises(UnsupportedModelError, match=layer):
        quantizer("int8")(model)
    assert {type(weight) for weight in model.parameters()} == {nn.Parameter}


def test_a_quantised_model_is_not_quantised_again() -> None:
    """Guards against scales of scales."""
    with pytest.raises(UnsupportedModelError, match="is a Linear of Int8Tensor"):
        int8("llama").quantized("int8")


_SHARED = """
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from specdecode.models.quantize import weight_bytes

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
layer = torch.nn.Linear(4, 8)
layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)]))
print(weight_bytes(layer))
dist.destroy_process_group()
"""


def test_weights_that_processes_share_are_counted() -> None:
    """Guards against a crash of all that counts bytes. (In a process of its own, as it joins a group of processes.)"""
    done = subprocess.run([sys.executable, "-c", _SHARED], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str((4 * 8 + 8) * 4)], done.stderr
