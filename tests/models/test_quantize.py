from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from specdecode import (
    LM,
    DraftTree,
    FixedK,
    Generation,
    ModelDrafter,
    PromptLookup,
    ReplayDrafter,
    generate,
    load,
)
from specdecode.backends.layouts import Layout, _is_exact
from specdecode.backends.row_attention import separate_rows
from specdecode.bench.measure.bandwidth import roofline_throughput
from specdecode.bench.measure.check import classify
from specdecode.core.errors import UnsupportedModelError
from specdecode.models import quantized_linear
from specdecode.models.architectures import SHAPES
from specdecode.models.quantize import COARSE, KINDS, quantizer
from specdecode.models.quantized_linear import Int4Linear, Int8Linear
from tests.helpers.discovery import DRAFTERS, POLICIES
from tests.helpers.drafts import new_examples, part
from tests.helpers.models import ARCHITECTURES, build, continuation, logits, prompt, quantisable, small
from tests.helpers.suites import start_python

LENGTH = 40
NAMES = ("llama", "gpt-neox", "opt", "phi3", "mistral-window")
of_each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def plain(name: str) -> LM:
    return LM(build(quantisable(name)))


@functools.cache
def quantised(name: str, kind: str) -> LM:
    return plain(name).quantized(kind)


@functools.cache
def alone(name: str, kind: str, policy: str = "keep-all") -> Generation:
    """Decode autoregressively with the quantised model."""
    return generate(quantised(name, kind), prompt(), policy=POLICIES[policy], max_new_tokens=LENGTH)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers to quantise, in order, without a tied head."""
    embedding = model.get_input_embeddings()
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and m.weight is not embedding.weight}


def steps(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the distance between neighbours on the grid of each weight. [out, in]"""
    if kind == "int8":
        return (weight.float().abs().amax(1, keepdim=True) / 127.5).expand_as(weight)
    groups = weight.float().unflatten(1, (-1, 32))
    return ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(32, dim=1)


@functools.cache
def replaced(name: str, kind: str, by: Callable[[torch.Tensor, str], torch.Tensor]) -> PreTrainedModel:
    """Return the unquantised model with other weights in place of the quantised ones."""
    model = build(quantisable(name))
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight.copy_(by(layer.weight, kind))
    return model


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the quantised weight, computed by hand."""
    step = steps(weight, kind)
    if kind == "int8":
        return (weight.float() * (1 / step)).round().clamp(-128, 127).double() * step.double()
    least = weight.float().unflatten(1, (-1, 32)).amin(-1).repeat_interleave(32, dim=1)
    return ((weight.float() - least) / step).round().double() * step.double() + least.double()


def jittered(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight with noise of the size of the rounding error."""
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel()), dtype=torch.float64)
    return weight + (noise - 0.5).to(weight) * steps(weight, kind)


# The computed products.


@of_each_kind
@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_that_of_the_rounded_weights(name: str, kind: str) -> None:
    """Guards against scales of the wrong axis, layers that are left out, and a cache that quantised layers spoil.

    The reference is transformers' own decoding with weights rounded by hand. 4-bit weights are multiplied in float32.
    """
    text = [*prompt(), *alone(name, kind).tokens]
    reference = replaced(name, kind, rounded)
    expected, near = logits(reference, text), 1e-9 if kind == "int8" else 1e-4
    found = logits(quantised(name, kind).model, text)
    assert torch.allclose(found, expected, rtol=near, atol=near * expected.std().item())
    assert alone(name, kind).tokens == continuation(reference, prompt(), LENGTH)
    assert len(set(alone(name, kind).tokens)) > 10


@of_each_kind
@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_of_the_size_of_its_bits(name: str, kind: str) -> None:
    """Guards against weights that were not quantised at all, and against fewer bits than stated."""
    full, error = build(quantisable(name)), 0.0
    rough_model = quantised(name, kind).model
    assert any(isinstance(module, Int8Linear | Int4Linear) for module in rough_model.modules())
    for path, layer in linear_layers(full).items():
        rough = rough_model.get_submodule(path)
        off = rough(torch.eye(layer.in_features, dtype=torch.float64)).T
        off = (off if layer.bias is None else off - layer.bias[:, None]) - layer.weight
        share = off.abs() / steps(layer.weight, kind)
        assert (share <= 0.501).all()
        error = max(error, share.max().item())
    assert error > 0.45
    text = prompt(40)
    exact = logits(full, text)
    of_bits, of_noise = (
        (logits(other, text) - exact).std().item()
        for other in (quantised(name, kind).model, replaced(name, kind, jittered))
    )
    assert of_noise / 3 < of_bits < 3 * of_noise


def test_weights_on_a_grid_of_four_bits_keep_their_values() -> None:
    """Guards against a loss where a file's weights have 4 bits already, as in a Q4_1 file.

    Grids of another layer's groups, or one for a whole channel, do lose.
    """
    on_grid = replaced("llama", "int4", rounded)
    text = prompt(40)
    exact = logits(on_grid, text)
    kept, coarse = (logits(LM(on_grid).quantized(kind).model, text) for kind in ("int4", COARSE))
    assert torch.allclose(kept, exact, rtol=1e-4, atol=1e-4 * exact.std().item())
    assert (coarse - exact).std() > 0.1 * exact.std()


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(rows=st.integers(2, 63), data=st.data())
@settings(max_examples=20)
def test_a_row_is_the_same_beside_any_others(kind: str, dtype: torch.dtype, rows: int, data: st.DataObject) -> None:
    """Guards against tokens that depend on the draft, because a row's product rounds differently beside other rows."""
    layer = nn.Sequential(nn.Linear(96, 40)).to(dtype)
    quantizer(kind)(layer)
    inputs = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype)
    together = layer(inputs)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert torch.equal(layer(inputs[first:last]), together[first:last])


def layout_of(kind: str) -> Layout:
    """Weights of a kind, as a layout."""

    def pack(weight: torch.Tensor) -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
        linear.weight = nn.Parameter(weight)
        layer = nn.Sequential(linear)
        quantizer(kind)(layer)
        return layer

    return Layout(kind, pack, lambda inputs, layer, *_: layer(inputs))


def scaled_together(inputs: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    """Multiply 8-bit activations that have one scale for all rows, as dynamic quantisation often has."""
    scale = inputs.abs().max() / 127
    return (inputs / scale).round() @ weight.T * scale


def test_the_order_of_a_sum_is_that_of_a_row_alone() -> None:
    """Guards against kernels that sum by the number of rows, and shows why activations have no scale of all rows."""
    shapes = [(576, 1536), (192, 576)]
    assert not _is_exact(Layout("together", lambda weight: weight, scaled_together), shapes, torch.float32)
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            assert _is_exact(layout_of(kind), shapes, dtype)


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_long_prompt_is_read_alike(kind: str, dtype: torch.dtype) -> None:
    """Guards against another rounding in the product over many rows, where a draft makes a prompt longer."""
    layer = nn.Sequential(nn.Linear(96, 40)).to(dtype)
    quantizer(kind)(layer)
    inputs = torch.randn(200, 96, dtype=dtype)
    few = torch.cat([layer(part) for part in inputs.split(20)])
    assert torch.allclose(layer(inputs), few, rtol=0, atol=1e-12)


@pytest.mark.parametrize("library", [True, False])
def test_the_text_of_a_prompt_is_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    """Guards against a slow kernel for the rows of a prompt, with or without oneDNN, and against a draft behind them
    that is multiplied otherwise than alone.
    """
    if not library:
        monkeypatch.setattr(quantized_linear, "packed_layouts", lambda dtype: [])
    layer = Int8Linear(nn.Linear(96, 40))
    rows = torch.randn(1, 100, 96)
    with separate_rows([100], [4]):
        together = layer(rows)
    expected = rows.double() @ (layer.integers.double() * layer.scales.double()[:, None]).T + layer.bias.double()
    errors = (together - expected).abs().amax(-1)[0]
    assert errors[:96].max() < 1e-5 < errors[96:].min()
    assert torch.equal(together[:, 96:], layer(rows[:, 96:]))


# Speculation.


@settings(max_examples=30)
@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(KINDS),
    policy=st.sampled_from(sorted(POLICIES)),
    file=st.sampled_from(sorted(DRAFTERS)),
    k=st.integers(1, 9),
    data=st.data(),
)
def test_the_tokens_are_those_of_the_quantised_model_alone(
    name: str, kind: str, policy: str, file: str, k: int, data: st.DataObject
) -> None:
    """Guards against a product that depends on its number of rows, and a draft that changes the tokens."""
    target = quantised(name, kind)
    drafters = new_examples(file, target) | {"unquantised": ModelDrafter(part(plain(name), 0, 1, 3))}
    drafter = drafters[data.draw(st.sampled_from(sorted(drafters)))]
    kept = POLICIES[policy]
    result = generate(target, prompt(), drafter=drafter, controller=FixedK(k), policy=kept, max_new_tokens=LENGTH)
    assert result.tokens == alone(name, kind, policy).tokens


@of_each_kind
def test_drafts_are_accepted_and_rejected_and_the_weights_change_the_text(kind: str) -> None:
    """Guards against a comparison that proves nothing: nothing drafted, every draft wrong, or no effect of
    quantisation.
    """
    unquantised = {name: continuation(plain(name).model, prompt(), LENGTH) for name in NAMES}
    assert [name for name in NAMES if alone(name, kind).tokens == unquantised[name]] == []
    drafter = ModelDrafter(plain("llama").subset([0, 1, 3]))
    replayed = ReplayDrafter(drafter, [*prompt(), *alone("llama", kind).tokens], acceptance=0.7)
    result = generate(quantised("llama", kind), prompt(), drafter=replayed, max_new_tokens=LENGTH)
    assert result.tokens == alone("llama", kind).tokens
    assert {step.accepted for step in result.steps} >= {0, 1, 2}


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [20, 90])
def test_what_follows_a_long_text_changes_no_bit(
    kind: str, dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a fast product over a long text that rounds by the number of rows, against one that the tokens
    behind the text take part in, and against a text that few-row kernels read row by row, which takes far longer.
    """
    target = LM(build(quantisable("llama") | {"tie_word_embeddings": False}).to(dtype)).quantized(kind)
    text, chain = list(prompt(length)), DraftTree.chain(torch.tensor([7, 11, 13, 17, 19]))
    rows: list[int] = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, *others: (rows.append(len(x)), kernel(x, *others))[1])

    def logits_behind(read_before: int, drafted: DraftTree) -> torch.Tensor:
        slots = target.new_slots(128)
        if read_before:
            target.forward(slots, torch.tensor(text[:read_before]), rows=0)
        return target.forward_tree(slots, text[read_before:], drafted)

    together = logits_behind(0, chain)
    assert torch.equal(logits_behind(0, DraftTree.empty())[0], together[0])
    assert torch.equal(logits_behind(length - 1, chain), together)
    if kind == "int8":
        assert max(rows) == (length - 1 + 6 if length == 20 else 6)


@of_each_kind
def test_in_float32_no_token_is_wrong(kind: str) -> None:
    """Guards against products of one row and of several that differ by more than the dtype's rounding."""
    target = LM(build(quantisable("llama")).float()).quantized(kind)
    assert target.dtype == torch.float32
    for text in (prompt(9), prompt(30)):
        expected = generate(target, text, max_new_tokens=30).tokens
        for drafter in (ModelDrafter(plain("llama").subset([0, 1, 3])), PromptLookup()):
            got = generate(target, text, drafter=drafter, max_new_tokens=30).tokens
            assert classify(target, text, expected, got) != "bug"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_stay_within_the_type(dtype: torch.dtype) -> None:
    """Guards against infinities in 16 bits: the product with the integers is 250 times larger than the one with the
    weights.

    Real models have such large activations before a layer of small weights.
    """
    layer = nn.Sequential(nn.Linear(64, 8)).to(dtype)
    with torch.no_grad():
        layer[0].weight.uniform_(0.2, 0.5)
    x = torch.full((3, 64), 30.0, dtype=dtype)
    expected = layer(x)
    quantizer("int8")(layer)
    assert torch.allclose(layer(x), expected, rtol=0.01)


# The unchanged parts.


def test_quantising_leaves_the_model_alone_and_shares_the_rest() -> None:
    """Guards against changing the unquantised target, which other arms decode, and against a second copy of the other
    weights.
    """
    target = small(vocab_size=31)
    before, size = logits(target.model, range(20)), target.weight_bytes
    rough = target.quantized("int8")
    assert rough is target.quantized("int8")
    assert torch.equal(logits(target.model, range(20)), before)
    assert target.weight_bytes == size
    assert rough.model.get_input_embeddings().weight is target.model.get_input_embeddings().weight
    assert not torch.equal(logits(rough.model, range(20)), before)
    assert rough.name == "small (int8)"


@of_each_kind
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_layers_of_a_quantised_target_are_a_quantised_draft(name: str, kind: str) -> None:
    """Guards against a subset that loses the scales, or shares another layer's."""
    text = prompt(30)
    target = quantised(name, kind)
    draft, other = target.subset([0, 2]), plain(name).subset([0, 2]).quantized(kind)
    assert torch.equal(logits(draft.model, text), logits(other.model, text))
    result = generate(target, prompt(), drafter=ModelDrafter(draft), max_new_tokens=LENGTH)
    assert result.tokens == alone(name, kind).tokens
    assert load("layers:0,2", target=target).weight_bytes == draft.weight_bytes


def test_a_head_that_is_tied_stays_with_its_embedding() -> None:
    """Guards against a vocabulary that is stored twice, and against a silently untied head."""
    tied = LM(build(ARCHITECTURES["llama"] | {"tie_word_embeddings": True})).quantized("int8").model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert tied.get_output_embeddings().weight.nbytes == 97 * 32 * 8
    own = quantised("llama", "int8").model
    assert type(own.get_output_embeddings()) is Int8Linear
    assert type(own.get_input_embeddings().weight) is nn.Parameter


# Memory.


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [True, False])
def test_weights_are_counted_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ties: bool, kind: str
) -> None:
    """Guards against reporting the bytes of the unquantised weights, without scales, or with a tied head
    counted twice.
    """
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "tie_word_embeddings": ties}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 112}
    target = LM(build(ARCHITECTURES["llama"] | sizes).to(dtype))
    # Outputs and inputs of each linear layer: queries, keys, values, output; up, gate, down.
    layers = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)] * 2 + [(112, 32)] * (not ties)
    weights, channels = sum(a * b for a, b in layers), sum(a for a, _ in layers)
    rest = (112 * 32 + 5 * 32) * dtype.itemsize  # the embedding, two norms in each layer and one at the end
    assert target.weight_bytes == weights * dtype.itemsize + rest
    rough = target.quantized(kind)
    stored = weights + 4 * channels if kind == "int8" else weights // 2 + 4 * weights // 32
    assert rough.weight_bytes == stored + rest
    monkeypatch.setattr("specdecode.bench.measure.bandwidth.read_bandwidth", lambda device: 1e9)
    unread = 0 if ties else 112 * 32 * dtype.itemsize
    assert roofline_throughput(rough) == pytest.approx(1e9 / (rough.weight_bytes - unread))


# Loading and refusals.


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_is_loaded_quantised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, dtype: torch.dtype, kind: str
) -> None:
    """Guards against an option that is accepted and has no effect, for folders and for shapes."""
    plain("llama").model.save_pretrained(tmp_path)
    expected = load(str(tmp_path), dtype=dtype, device="cpu", backend="eager").quantized(kind)
    loaded = load(str(tmp_path), dtype=dtype, device="cpu", quantize=kind, backend="eager")
    assert torch.equal(logits(loaded.model, prompt()), logits(expected.model, prompt()))
    assert loaded.weight_bytes == expected.weight_bytes
    assert loaded.name == f"{tmp_path} ({kind})"
    monkeypatch.setitem(SHAPES, "tiny", quantisable("llama"))
    random = load("shape:tiny", dtype=dtype, device="cpu", quantize=kind, backend="eager")
    assert random.weight_bytes == expected.weight_bytes
    assert random.synthetic


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("./nowhere", {"quantize": "int3"}, "quantize is 'int3': choose from int8, int4"),
        ("./nowhere", {"quantize": "INT8"}, "quantize is 'INT8'"),
        ("layers:0", {"quantize": "int8"}, "'layers:0' shares the weights of its target"),
    ],
)
def test_what_cannot_be_loaded_quantised_is_reported_before_anything_is_read(
    name: str, options: dict[str, str], sentence: str
) -> None:
    """Guards against minutes of loading before a misspelt option is reported, and against an option that is ignored."""
    with pytest.raises(ValueError, match=sentence):
        load(name, target=plain("llama"), **options)


def test_four_bits_are_for_a_processor() -> None:
    """Guards against a traceback from a kernel that a GPU lacks."""
    with pytest.raises(ValueError, match="only a CPU multiplies with 4-bit weights: use 'int8' on cuda"):
        quantizer("int4", torch.device("cuda"))
    quantizer("int8", torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "layer"), [("gpt-2", "transformer.h.0.attn.c_attn is a Conv1D"), ("falcon", "a FalconLinear")]
)
def test_weights_that_would_stay_as_they_are_are_refused(name: str, layer: str) -> None:
    """Guards against a model that is called quantised and is not."""
    model = build(quantisable(name))
    with pytest.raises(UnsupportedModelError, match=layer):
        quantizer("int8")(model)
    assert {type(weight) for weight in model.parameters()} == {nn.Parameter}


def test_groups_that_do_not_fit_are_refused() -> None:
    """Guards against a group of weights that extends into the next row."""
    with pytest.raises(UnsupportedModelError, match=r"down_proj has 48 inputs, no multiple of 32; use 'int8'"):
        quantizer("int4")(build(ARCHITECTURES["llama"] | {"intermediate_size": 48}))


def test_a_quantised_model_is_not_quantised_again() -> None:
    """Guards against quantising the quantised weights again."""
    with pytest.raises(UnsupportedModelError, match="is a Int8Linear of Parameter"):
        quantised("llama", "int8").quantized("int8")


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
    """Guards against a crash when the bytes of split weights are counted.

    It runs in a process of its own, as it joins a group of processes.
    """
    done = start_python(_SHARED).wait()
    assert done.stdout.split() == [str((4 * 8 + 8) * 4)], done.stderr
