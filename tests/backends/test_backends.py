"""Every backend of a forward: the tokens are the same, or differ by rounding alone."""

from __future__ import annotations

import functools
import gc
import math
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import sdpa_attention

from specdecode import (
    LM,
    BestFirstTree,
    DraftTree,
    FixedK,
    Generation,
    HeadDrafter,
    ModelDrafter,
    PromptLookup,
    Sampling,
    generate,
    generate_batch,
    load,
)
from specdecode.backends import Backend, kernels, layouts, prepare
from specdecode.backends import packed as packing
from specdecode.backends import static as shapes
from specdecode.backends.graph import CudaGraphs
from specdecode.backends.grouped_attention import GROUPED, group
from specdecode.backends.layouts import (
    ONEDNN,
    ONEDNN_IN_FLOAT32,
    ONEMKL,
    PLAIN,
    ROW_BY_ROW,
    Layout,
    exact_layouts,
    in_blocks,
    packed_layouts,
)
from specdecode.backends.packed import PackedLinear
from specdecode.backends.row_attention import by_rows
from specdecode.backends.static import Capture, StaticRunner
from specdecode.backends.static_inputs import StaticInputs
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.measure.check import classify
from specdecode.bench.measure.timed import timed_by
from specdecode.controllers.base import Controller, Limit
from specdecode.core.errors import SpecDecodeError, UnsupportedModelError
from specdecode.core.sampling import most_probable
from specdecode.core.slots import Slots
from specdecode.decoding.teacher_forced import teacher_forced
from specdecode.drafters.base import Context
from specdecode.drafters.none import NoDraft
from specdecode.heads.bound import BoundHead, untrained
from specdecode.models.variants import shared_copy
from tests.helpers import models
from tests.helpers.characters import save
from tests.helpers.discovery import DRAFTERS, POLICIES
from tests.helpers.drafts import example_in_turn, new_examples
from tests.helpers.models import ARCHITECTURES, SERVED, UNCAPTURED, VOCABULARY, build, greedy, lm, moved, prompt
from tests.helpers.replayed import replayed
from tests.helpers.strategies import controllers
from tests.helpers.suites import start_python

LENGTH = 40


def on_the_cpu(name: str, **values: Any) -> PreTrainedModel:
    """Build a model in float32 on the CPU, whatever device the other tests use."""
    return moved(build(ARCHITECTURES[name] | values).float(), "cpu")


STATIC = {
    "direct": Backend("direct", static=partial(StaticRunner, capture=None)),
    "rounded": Backend("rounded", static=partial(StaticRunner, capture=replayed)),
}

if torch.device(models.DEVICE).type == "cuda":
    DEVICE = torch.device(models.DEVICE)
    STATIC["graph"] = Backend("graph", static=lambda forward: StaticRunner(forward, CudaGraphs(DEVICE)))


@functools.cache
def over_static_shapes(name: str, backend: str) -> LM:
    model = build(ARCHITECTURES[name])
    group(model)
    return LM(model, lm(name).tokenizer, name=name, backend=STATIC[backend])


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the spans of keys, so that short texts outgrow them."""
    monkeypatch.setattr(shapes, "_SPAN_MULTIPLE", 16)


@functools.cache
def alone(name: str, policy: str, temperature: float) -> Generation:
    """Decode plainly, with transformers' own forwards."""
    sampling = Sampling(temperature, seed=3)
    return generate(lm(name), prompt(), policy=POLICIES[policy], sampling=sampling, max_new_tokens=LENGTH)


@functools.cache
def eager(name: str) -> LM:
    return LM(on_the_cpu(name), name=name)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 65, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_layer_is_the_layer(rows: int, bias: bool, dtype: torch.dtype) -> None:
    """Guards against a layout that is right for only one number of rows or one type, and against one that still reads
    the original weight.
    """
    torch.manual_seed(rows)
    own = packed_layouts(dtype)
    copies = [*own, *([ONEDNN_IN_FLOAT32] if dtype != torch.float32 else [])]
    blocks = [in_blocks(layout, 4) for layout in (*copies, PLAIN)]
    for layout in (*copies, PLAIN, ROW_BY_ROW, *blocks):
        plain = nn.Linear(48, 80, bias).to(dtype)
        packed = PackedLinear([plain], layout)
        exact, own_bias = plain.weight.detach().double(), plain.bias.detach().double() if bias else None
        if layout.pack is not PLAIN.pack and layout is not ROW_BY_ROW:
            plain.weight.data.zero_()
        for shape in ((rows, 48), (1, rows, 48), (3, rows, 48)):
            inputs = torch.randn(shape).to(dtype)
            expected = nn.functional.linear(inputs.double(), exact, own_bias)
            output = packed(inputs)
            assert (output.shape, output.dtype) == (expected.shape, dtype)
            bound = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
            assert (output.double() - expected).abs().max() < bound, layout.name


def sums_in_another_order(inputs: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    """Multiply so that the order of the sum depends on the number of rows."""
    first, rest = (inputs.float()[:, None] * weight.float()).tensor_split([1 + len(inputs)], dim=-1)
    return (first.sum(-1) + rest.sum(-1)).to(inputs.dtype)


def sums_the_last_rows_in_another_order(block: int) -> Layout:
    """A layout that sums the rows behind the last full block in another order, as matrix libraries do. The products of
    16-bit weights are rounded after the sum.
    """

    def multiply(inputs: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        terms = inputs.float()[:, None] * weight.float()
        first, rest = terms.split(7, dim=-1), terms.split(5, dim=-1)
        sums = (sum(part.sum(-1) for part in parts) for parts in (first, rest))
        in_full, behind = (torch.as_tensor(total).to(inputs.dtype) for total in sums)
        full = len(inputs) // block * block
        return torch.cat([in_full[:full], behind[full:]])

    return Layout(f"blocks of {block}", lambda weight: weight, multiply)


SHAPES = [(80, 48), (90, 37)]


def test_a_layout_is_exact_only_if_no_row_changes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a backend "exact" on a processor whose library rounds a row by the number of rows, and against
    weights that are laid out in float32 where they can be multiplied as they are.
    """
    varying = Layout("varying", lambda weight: weight, sums_in_another_order)
    monkeypatch.setattr(layouts, "packed_layouts", lambda dtype: [varying])
    monkeypatch.setattr(layouts, "PLAIN", varying)
    assert exact_layouts(SHAPES, torch.float32) == [ROW_BY_ROW]
    assert exact_layouts(SHAPES, torch.float64) == [ROW_BY_ROW]
    same = Layout("same", lambda weight: weight, ROW_BY_ROW.multiply)
    monkeypatch.setattr(layouts, "packed_layouts", lambda dtype: [varying, same])
    assert exact_layouts(SHAPES, torch.float32) == [same]
    monkeypatch.setattr(layouts, "packed_layouts", lambda dtype: [layouts.ONEDNN])
    monkeypatch.setattr(layouts, "ONEDNN", same)
    assert exact_layouts(SHAPES, torch.bfloat16) == [same]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_is_exact_in_full_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Guards against products row by row where full blocks are exact, against blocks that are larger than needed, and
    against 16 bits that hide in which order a sum was made.
    """
    two, four = sums_the_last_rows_in_another_order(2), sums_the_last_rows_in_another_order(4)
    monkeypatch.setattr(layouts, "packed_layouts", lambda dtype: [two, four])
    monkeypatch.setattr(layouts, "PLAIN", sums_the_last_rows_in_another_order(32))
    monkeypatch.setattr(layouts, "_onednn_types", list)
    assert exact_layouts(SHAPES, dtype) == [in_blocks(two, 2), in_blocks(four, 4)]


@pytest.mark.skipif(
    ONEDNN not in packed_layouts(torch.bfloat16), reason="this processor has no oneDNN products in bfloat16"
)
def test_sixteen_bits_are_packed_where_the_processor_multiplies_them() -> None:
    """Guards against a target in bfloat16 that stays on "eager" though the processor has a layout for it."""
    assert prepare("packed", on_the_cpu("llama").bfloat16()).note.endswith("by oneDNN")


@pytest.mark.parametrize("name", ["gpt-neox", "gemma3-window", "phi3"])
def test_packed_decoding_is_its_own_plain_decoding(name: str) -> None:
    """Guards against a packed model whose speculative tokens differ from its plain ones by more than rounding, and
    against a model that is not packed at all.
    """
    target = eager(name).with_backend("packed")
    assert target.backend.name == "packed"
    assert sum(isinstance(module, PackedLinear) for module in target.model.modules()) > 8
    alone = generate(target, prompt(), drafter=NoDraft(), max_new_tokens=LENGTH).tokens
    unpacked = generate(eager(name), prompt(), max_new_tokens=LENGTH).tokens
    assert classify(eager(name), prompt(), unpacked, alone) != "bug"
    for drafter in (drafter for file in DRAFTERS for drafter in new_examples(file, target).values()):
        tokens = generate(target, prompt(), drafter=drafter, controller=FixedK(4), max_new_tokens=LENGTH).tokens
        assert classify(target, prompt(), alone, tokens) != "bug", drafter
    # The classification itself can fail.
    assert classify(target, prompt(), alone, [*alone[:3], (alone[3] + 1) % target.vocab_size, *alone[4:]]) == "bug"


def test_weights_are_packed_once_and_the_plain_ones_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a second packed copy of the weights for a draft or an arm, against plain weights that stay in
    memory, and against weight bytes that are not counted.
    """
    plain = eager("llama")
    target = plain.with_backend("packed")
    assert target is plain.with_backend("packed")

    def layouts(model: nn.Module) -> set[int]:
        return {id(module.packed) for module in model.modules() if isinstance(module, PackedLinear)}

    subset = plain.subset([0, 2]).with_backend("packed")
    assert layouts(subset.model) < layouts(target.model)
    assert layouts(target.subset([0, 2]).model) == layouts(subset.model)
    assert target.subset([0, 2]).backend == target.backend
    assert target.weight_bytes == plain.weight_bytes

    model = on_the_cpu("llama", tie_word_embeddings=True)
    weights = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    before = LM(model).weight_bytes
    held = []

    class Watched(PackedLinear):
        def __init__(self, layers: Sequence[nn.Linear], layout: Layout) -> None:
            super().__init__(layers, layout)
            held.append(sum(weight() is not None for weight in weights))

    monkeypatch.setattr(packing, "PackedLinear", Watched)
    backend = prepare("packed", model)
    # The last weight is the tied head. Besides it, only the weights of one module may still be in memory.
    assert held[-1] < 5 < held[0] - 20, "the plain weights must not wait for the last of them to be packed"
    gc.collect()
    # The head is tied to the embedding, which stays. The head is packed as a further copy.
    assert [weight() is None for weight in weights] == [True] * (len(weights) - 1) + [False]
    embedding = model.get_input_embeddings().weight
    assert LM(model, backend=backend).weight_bytes == before + embedding.nbytes
    # These layouts leave it as it is: it still lies in the embedding.
    for layout in (PLAIN, ROW_BY_ROW, in_blocks(PLAIN, 4)):
        model = on_the_cpu("llama", tie_word_embeddings=True)
        packing.pack(model, layout)
        assert LM(model).weight_bytes == before


def test_what_cannot_be_packed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a requested backend that is silently replaced by another, and against a model that is only half
    packed without a note.
    """
    double = prepare("packed", on_the_cpu("llama").double())
    assert double.name == "eager"
    assert str(double) == "eager (not packed: no library has a layout for float64 on this processor)"
    convolutions = on_the_cpu("gpt-2")
    assert re.fullmatch(
        r"1 linear layers by one\w+, 16 other matrices as they are", prepare("packed", convolutions).note
    )
    assert "no plain linear layers" in str(prepare("packed", on_the_cpu("gpt-2", tie_word_embeddings=False).to("meta")))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert prepare("packed", on_the_cpu("llama")).note.endswith("by oneDNN")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    without = prepare("packed", on_the_cpu("llama"))
    assert "no library has a layout for float32" in str(without)


Ways = Sequence[partial[object]]


def seconds_by(costs: Mapping[str | int, Mapping[str, float]], calls: list[int]) -> Callable[..., list[float]]:
    """Return a clock for trials.

    Args:
        costs: seconds of a layer by layout, 1 if it is not there: for layers of this number of outputs, and for "all"
            others.
        calls: gets the number of layers of each trial.
    """

    def seconds(*ways: Ways) -> list[float]:
        calls.append(len(ways[0]))
        layers = [way[0].func for way in ways]
        return [
            len(way) * costs.get(layer.out_features, costs["all"]).get(layer.layout.name, 1.0)
            for way, layer in zip(ways, layers, strict=True)
        ]

    return seconds


@pytest.mark.parametrize(
    ("tried", "costs", "backend"),
    [
        (2**14, {"all": {"PyTorch": 1.05, "oneDNN": 1.02}}, "eager"),
        (2**14, {"all": {"PyTorch": 1.15, "oneDNN": 1.02}}, "packed (29 linear layers by oneMKL)"),
        (2**14, {"all": {"PyTorch": 1.15, "oneMKL": 1.02}}, "packed (29 linear layers by oneDNN)"),
        # The head is as wide as the vocabulary. One layer of each shape is timed, but only one of 29 layers is a head.
        (1, {VOCABULARY: {"PyTorch": 2.0}, "all": {"PyTorch": 0.95}}, "eager"),
        (1, {VOCABULARY: {"PyTorch": 4.0}, "all": {"PyTorch": 1.02}}, "packed (29 linear layers by oneMKL)"),
    ],
)
def test_auto_packs_where_that_gains(
    tried: int,
    costs: dict[str | int, dict[str, float]],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Guards against `auto` that packs where packing is no faster, that doesn't pack where it is faster, that takes the
    slower of two layouts, or that judges by a few untypical layers.
    """
    monkeypatch.setattr(packing, "_seconds", seconds_by(costs, []))
    monkeypatch.setattr(packing, "packed_layouts", lambda dtype: [ONEMKL, ONEDNN])
    monkeypatch.setattr(packing, "_TRIAL_BYTES", tried)
    monkeypatch.setenv("SPECDECODE_CACHE", str(tmp_path))
    model = on_the_cpu("llama")
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    # That `exact` multiplies plain weights in blocks shows nothing of what is fastest.
    packing._laid_out([layer], in_blocks(PLAIN, 4))
    chosen = str(prepare("auto", model))
    assert chosen == backend
    # The other layouts of the trial are let go.
    name = "PyTorch" if chosen == "eager" else chosen.split()[-1].rstrip(")")
    assert [laid_out.layout.name for laid_out in packing._packed[layer.weight]] == [name]


def test_a_large_model_is_tried_once_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against seconds of trials at each start, and against runs on one machine that take different layouts by
    chance. Another model is tried anew, and so is this one where the file is damaged or cannot be written.
    """
    trials: list[int] = []

    def tried(name: str = "llama") -> str:
        trials.clear()
        return prepare("auto", on_the_cpu(name)).note.partition(" by ")[2]

    def faster(layout: str) -> None:
        monkeypatch.setattr(packing, "_seconds", seconds_by({"all": {layout: 0.5}}, trials))

    monkeypatch.setattr(packing, "packed_layouts", lambda dtype: [ONEMKL, ONEDNN])
    monkeypatch.setattr(packing, "_TRIAL_BYTES", 1)
    monkeypatch.setenv("SPECDECODE_CACHE", str(tmp_path / "cache"))
    faster("oneDNN")
    assert tried() == "oneDNN"
    assert trials
    faster("oneMKL")
    assert tried() == "oneDNN"
    assert not trials
    faster("PyTorch")
    assert tried("gpt-neox") == ""
    assert trials
    assert (tried("gpt-neox"), trials) == ("", [])
    for damaged in ("{", "3", '{"a": 1}', "[[1]]"):
        (tmp_path / "cache" / "trials.json").write_text(damaged)
        assert tried() == ""
        assert trials
        assert (tried(), trials) == ("", [])
    kept = tmp_path / "cache" / "trials.json"
    kept.write_text(kept.read_text().replace(': "PyTorch"', ': "no layout"'))
    assert tried() == ""
    assert trials
    monkeypatch.setenv("SPECDECODE_CACHE", str(kept))  # no folder
    assert tried() == ""
    assert trials


def test_a_model_that_fits_the_caches_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a small model whose backend, and so the last bits of its logits, chance decides at each start."""
    trials: list[int] = []
    monkeypatch.setattr(packing, "packed_layouts", lambda dtype: [ONEMKL, ONEDNN])
    monkeypatch.setattr(packing, "_seconds", seconds_by({"all": {"oneDNN": 0.5}}, trials))
    assert str(prepare("auto", on_the_cpu("llama"))) == "eager"
    assert str(prepare("packed", on_the_cpu("llama"))) == "packed (29 linear layers by oneMKL)"
    assert not trials


def test_weights_that_are_packed_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against a draft of the target's layers in another layout than the target's, with a second copy of the
    weights.
    """
    trials: list[int] = []
    monkeypatch.setattr(packing, "_TRIAL_BYTES", 1)
    monkeypatch.setenv("SPECDECODE_CACHE", str(tmp_path))
    monkeypatch.setattr(packing, "packed_layouts", lambda dtype: [ONEMKL, ONEDNN])
    monkeypatch.setattr(packing, "_seconds", seconds_by({"all": {"oneDNN": 0.5}}, trials))
    plain = LM(on_the_cpu("llama"))
    assert plain.with_backend("auto").backend.note.endswith("by oneDNN")
    trials.clear()
    monkeypatch.setattr(packing, "_seconds", seconds_by({"all": {"oneMKL": 0.5}}, trials))
    for kind in ("auto", "packed"):
        assert plain.subset([0, 2]).with_backend(kind).backend.note.endswith("by oneDNN")
    assert not trials


def test_backends_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a misspelt backend that is accepted as another one, and against quantising weights that packing
    has removed.
    """
    folder = str(save(tmp_path / "model"))
    with pytest.raises(ValueError, match="no backend is named 'packd': choose from auto, eager, packed"):
        load(folder, device="cpu", backend="packd")
    for backend, reason in (("packd", "no backend is named"), ("graph", "need a GPU")):
        with pytest.raises(ValueError, match=reason):
            load("./nowhere", device="cpu", backend=backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="for a GPU: use compile"):
        load("./nowhere", device="cpu", backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="triton, which is not installed: pip install triton"):
        load("./nowhere", device="cpu", backend="triton")
    target = load(folder, device="cpu", backend="packed")
    assert target.backend.name == "packed"
    with pytest.raises(ValueError, match="cannot be quantised: it runs on the backend packed"):
        target.quantized("int8")
    for other in ("auto", "eager"):
        with pytest.raises(ValueError, match="cannot be given another backend"):
            target.with_backend(other)
    assert target.with_backend("packed") is target


def test_peers_decode_the_plain_model() -> None:
    """Guards against transformers' own decoding timed with our packed layers, and against our arms timed
    without them.
    """
    plain = eager("llama")
    packed = plain.with_backend("packed")
    for entry, expected in (({"drafter": "lookup"}, packed), ({"drafter": "lookup", "backend": "eager"}, plain)):
        assert make_arm("arm", entry, plain, None, "packed").target is expected
    peer = make_arm("peer", {"peer": "generate"}, plain, None, "packed")
    assert peer.target is plain
    ran = []
    for module in packed.model.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda *_: ran.append(1))
    peer.run(prompt(), 4, ())
    assert not ran
    run = make_arm("ours", {"drafter": "model", "k": 2}, plain, plain.subset([0]), "packed").run(prompt(), 4, ())
    assert ran
    assert run.tokens == generate(packed, prompt(), drafter=PromptLookup(), max_new_tokens=4).tokens


@settings(max_examples=45, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(ARCHITECTURES)),
    backend=st.sampled_from(sorted(STATIC)),
    policy=st.sampled_from(sorted(POLICIES)),
    file=st.sampled_from(sorted(DRAFTERS)),
    which=st.integers(0, 3),
    make_controller=controllers(),
    temperature=st.sampled_from([0.0, 0.9]),
)
def test_static_shapes_change_no_token(
    name: str,
    backend: str,
    policy: str,
    file: str,
    which: int,
    make_controller: Callable[[], Controller],
    temperature: float,
    short_spans: None,
) -> None:
    """Guards against wrong tokens over static shapes: padding that is attended to or overwrites kept keys, keys in
    wrong slots, a capture used for another shape or for slots that have moved, and masks without the window.
    """
    assume(policy == "keep-all" or name in SERVED)
    assume(backend != "graph" or name not in UNCAPTURED)  # test_cuda.py tests this case
    target = over_static_shapes(name, backend)
    # When sampling, a draft may change which text is drawn, though not the distribution.
    drafter = example_in_turn(file, target, which) if temperature == 0.0 else NoDraft()
    result = generate(
        target,
        prompt(),
        drafter=drafter,
        controller=make_controller(),
        policy=POLICIES[policy],
        sampling=Sampling(temperature, seed=3),
        max_new_tokens=LENGTH,
    )
    assert result.tokens == alone(name, policy, temperature).tokens
    assert result.compressions == alone(name, policy, temperature).compressions


def counted(captured: list[int]) -> Capture:
    """Return a capture that counts its calls."""

    def replay(action: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], tuple[torch.Tensor, ...]]:
        captured.append(1)
        return replayed(action)

    return replay


def test_each_shape_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against seconds of capturing for every text though its slots reuse an earlier storage, against a capture
    used for slots that have moved, and against captures without end.
    """
    captured: list[int] = []
    backend = Backend("counted", static=partial(StaticRunner, capture=counted(captured)))
    target = LM(lm("llama").model, backend=backend)
    captured.clear()

    def decode() -> list[int]:
        drafter = ModelDrafter(target)
        return generate(target, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=LENGTH).tokens

    expected = decode()
    assert 0 < len(captured) <= 8
    counts = []
    for _ in range(6):
        gc.collect()
        assert decode() == expected
        counts.append(len(captured))
    # Target and draft may swap storages once more before each storage has seen every shape.
    assert counts[2:] == counts[2:3] * 4

    slots = target.new_slots(8)
    tokens = torch.arange(5)
    before = target.forward(slots, tokens, rows=5)
    slots.keep([], after=0)
    assert torch.equal(target.forward(slots, tokens, rows=5), before)
    settled = len(captured)
    slots.keep([], after=0)
    slots.grow(slots.capacity + 300)
    assert torch.equal(target.forward(slots, tokens, rows=5), before)
    assert len(captured) == settled + 1
    # The tensors of a batch replace those that its prompts were read into.
    generate_batch(target, [prompt(9), prompt(14)], max_new_tokens=4)
    assert len(captured) == settled + 1

    monkeypatch.setattr(shapes, "_GRAPHS_PER_STORAGE", 2)
    for count in (1, 2, 3, 5, 9, 17):
        slots.keep([], after=0)
        target.forward(slots, torch.arange(count))
        assert len(target.static._graphs[slots.storage]) <= 9


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_a_captured_chain_is_the_chain(name: str, short_spans: None) -> None:
    """Guards against a captured draft that proposes worse tokens: the output would stay right, and only the speed would
    fall.
    """
    text, limit = list(prompt(20)), VOCABULARY - 1
    chains = []
    for target in (lm(name), over_static_shapes(name, "rounded")):
        for _ in range(2):  # the second pass reuses the storage of the first
            slots = target.new_slots(64)
            target.read(slots, text)
            longest: list[int] = []
            for read, count in ((0, 9), (0, 4), (1, 4), (2, 4), (3, 4), (0, 1)):
                tokens = torch.tensor([7, *longest[:read]])
                chosen = target.continue_greedily(slots, tokens, count, limit).tolist()
                assert slots.length == len(text) + len(tokens) + count - 1
                slots.keep([], after=len(text))
                longest = longest or chosen
                assert chosen == longest[read : read + count]
            chains.append(longest)
            assert max(longest) < limit
            assert len(set(longest)) > 3
            del slots
    assert chains == chains[:1] * 4


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_a_prompt_is_captured_and_not_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a prompt that waits for the launches of its kernels, against padding that changes its logits, and
    against one that is compiled, where a forward without a mask is faster.
    """
    text, run, static = torch.tensor(prompt(558)), StaticRunner.run, []

    def noted(runner: StaticRunner, slots: Slots, tokens: torch.Tensor, *others: Any, **named: Any) -> Any:
        static.append(len(tokens))
        return run(runner, slots, tokens, *others, **named)

    def decoded(target: LM) -> torch.Tensor:
        static.clear()
        slots = target.new_slots(64)
        return torch.cat([target.forward(slots, piece) for piece in text.split((100, 73, 385))])

    monkeypatch.setattr(StaticRunner, "run", noted)
    expected = decoded(lm(name))
    torch.testing.assert_close(decoded(over_static_shapes(name, "direct")), expected)
    assert static == []
    target = over_static_shapes(name, "rounded")
    rows: list[int] = []
    target.model.get_output_embeddings().register_forward_hook(lambda layer, given, out: rows.append(out.shape[1]))
    torch.testing.assert_close(decoded(target), expected)
    assert static == [100, 73, 385]
    assert len(target.forward(target.new_slots(64), text[:100], rows=0)) == 0
    assert set(rows) == {1}
    # A model of somebody else may compute the logits of all rows.
    monkeypatch.setattr("specdecode.models.forwards._takes_rows", lambda model: False)
    torch.testing.assert_close(decoded(target), expected)
    assert set(rows) == {1, 128, 512}


def test_a_head_reads_a_prompt_without_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a captured prompt of a head, with logits of all its rows."""
    target, rows = over_static_shapes("llama", "rounded"), []
    head = BoundHead(untrained(target), target)
    logits = head._logits
    monkeypatch.setattr(head, "_logits", lambda state: rows.append(len(state)) or logits(state))
    for _ in range(2):  # the second text finds tensors
        generate(target, prompt(100), drafter=HeadDrafter(head), controller=FixedK(3), max_new_tokens=8)
        gc.collect()
    assert max(rows) <= 8


def test_chosen_tokens_are_the_most_probable() -> None:
    """Guards against a choice of another row or of padding, and against a choice where there is none."""
    text = list(prompt(20))
    for target in (lm("qwen3"), over_static_shapes("qwen3", "direct"), over_static_shapes("qwen3", "rounded")):
        slots, outputs = target.new_slots(64), []
        target.read(slots, text)
        with overflowing(target, target.model.model.layers[-1].mlp, 9):
            for choose in (False, True):
                outputs.append(target.forward(slots, torch.tensor([5, 7, 9, 11, 13]), rows=4, choose=choose))
                slots.keep([], after=len(text))
        logits, choices = outputs
        assert choices.tolist() == most_probable(logits).tolist()
        assert [choice < 0 for choice in choices.tolist()] == [False, True, False, False]


def test_a_storage_in_a_batch_is_not_used_again() -> None:
    """Guards against two texts of a batch that overwrite each other's keys."""
    target = over_static_shapes("qwen3", "rounded")
    texts = [list(prompt(length)) for length in (9, 14, 23)]
    expected = [generate(lm("qwen3"), text, max_new_tokens=LENGTH).tokens for text in texts]
    for _ in range(2):
        results = generate_batch(target, texts, batch_size=2, drafter=PromptLookup, max_new_tokens=LENGTH)
        assert [result.tokens for result in results] == expected
        assert [generate(target, text, max_new_tokens=LENGTH).tokens for text in texts] == expected


def test_keys_of_a_text_that_overflowed_reach_no_other() -> None:
    """Guards against NaN logits after a text that overflowed, because rounded spans cover keys of earlier texts."""
    target = over_static_shapes("qwen3", "rounded")
    embedding = target.model.get_input_embeddings()
    overflow = embedding.register_forward_hook(lambda module, given, states: torch.full_like(states, torch.nan))
    with pytest.raises(SpecDecodeError):
        generate(target, prompt(40), max_new_tokens=LENGTH)
    # Teacher forcing needs no finite logits: it ends as usual.
    assert len(list(teacher_forced(target, prompt(40), 30))) > 0
    overflow.remove()
    gc.collect()
    expected = generate(lm("qwen3"), prompt(), max_new_tokens=LENGTH).tokens
    assert generate(target, prompt(), max_new_tokens=LENGTH).tokens == expected


class OneToken:
    """Proposes one token, again and again."""

    forwards = 0

    def __init__(self, token: int, layers: tuple[int, ...] = ()) -> None:
        self.token, self.layers = token, layers

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        return DraftTree.chain(torch.full((limit.depth,), self.token))


@contextmanager
def overflowing(target: LM, layer: nn.Module, token: int) -> Iterator[None]:
    """Within this context, a layer's output is NaN in the rows of one token."""
    rows: list[torch.Tensor] = [torch.empty(0)]

    def note(module: nn.Module, given: tuple[torch.Tensor]) -> None:
        rows[0] = (given[0] == token)[..., None]

    def spoil(module: nn.Module, given: object, states: torch.Tensor) -> torch.Tensor:
        return states.masked_fill(rows[0], torch.nan)

    hooks = [target.model.get_input_embeddings().register_forward_pre_hook(note), layer.register_forward_hook(spoil)]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=1, seed=1)], ids=["greedy", "sampled"])
def test_a_token_that_overflows_ends_the_text_as_in_plain_decoding(sampling: Sampling) -> None:
    """Guards against a step that is drawn again after the coins have accepted a proposal: then the text would hold that
    token less often than without drafts.
    """
    target = lm("qwen3")
    first = generate(target, prompt(), sampling=sampling, max_new_tokens=1).tokens[0]
    for drafter in (NoDraft(), OneToken(first)):
        emitted: list[int] = []
        with overflowing(target, target.model.model.layers[-1].mlp, first), pytest.raises(SpecDecodeError):
            generate(target, prompt(), drafter=drafter, sampling=sampling, max_new_tokens=9, on_step=emitted.extend)
        assert emitted == ([first] if isinstance(drafter, NoDraft) else [])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=1, seed=1)], ids=["greedy", "sampled"])
def test_a_proposal_that_overflows_changes_no_token(sampling: Sampling) -> None:
    """Guards against NaN logits where plain decoding has none: a proposal that overflows reaches the rows beside it,
    and rounded spans, padding and batches read it later.
    """
    options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": LENGTH}
    for target in (over_static_shapes("qwen3", "rounded"), lm("qwen3")):
        texts = [list(prompt(length)) for length in (9, 23)]
        plain = [generate(target, text, **options).tokens for text in texts]
        unused = next(
            token for token in range(1, VOCABULARY) if token not in {*texts[0], *texts[1], *plain[0], *plain[1]}
        )
        for layer in (target.model.model.embed_tokens, target.model.model.layers[-1].mlp):
            with overflowing(target, layer, unused):
                # The second drafter reads hidden states, which other captured forwards return.
                alone = [
                    generate(target, text, drafter=OneToken(unused, layers), **options)
                    for layers in ((), (0,))
                    for text in texts
                ]
                batch = generate_batch(target, texts, batch_size=2, drafter=partial(OneToken, unused), **options)
            assert [result.tokens for result in (*alone, *batch)] == 3 * plain
            if layer is target.model.model.embed_tokens:
                assert any(result.retries for result in (*alone, *batch))
            for result in alone:
                assert result.target_forwards == result.prefill_forwards + len(result.steps) + result.retries


def test_keys_of_a_draft_that_overflowed_reach_no_other_text() -> None:
    """Guards against a draft that proposes nothing useful for the rest of a session, because it overflowed once."""
    target, draft = lm("llama"), over_static_shapes("llama", "rounded")

    def accepted() -> int:
        drafter = ModelDrafter(draft)
        result = generate(target, prompt(), drafter=drafter, max_new_tokens=12).accepted
        del drafter
        gc.collect()
        return result

    expected = accepted()
    overflow = draft.model.get_input_embeddings().register_forward_hook(
        lambda module, given, states: torch.full_like(states, torch.nan)
    )
    assert accepted() < expected
    overflow.remove()
    assert accepted() == expected


def test_padding_rows_read_nothing_of_an_earlier_forward() -> None:
    """Guards against a token or a state that overflowed in an earlier text, and spoils every later one as padding."""
    seen: list[StaticInputs] = []

    def forward(inputs: StaticInputs, *slots: object) -> tuple[torch.Tensor]:
        assert inputs.states is not None
        seen[:] = [inputs]
        return (inputs.states,)

    runner = StaticRunner(forward, capture=replayed)
    slots = runner.new_slots(64, torch.device("cpu"))
    for rows, state in ((8, math.nan), (5, 1.0), (6, 2.0)):
        slots.append(torch.arange(rows))
        causal = torch.ones(rows, rows, dtype=torch.bool).tril()
        runner.run(slots, torch.full((rows,), rows), torch.arange(rows), causal, torch.full((rows, 3), state))
        slots.keep([], after=0)
        (inputs,) = seen
        assert inputs.tokens.tolist() == [rows] * 8
        assert inputs.states[rows:].tolist() == [[0.0] * 3] * (8 - rows)


def test_a_text_rounds_the_same_in_a_used_storage() -> None:
    """Guards against two equal calls that part at a tie: the prompt of one alone was read by a captured forward."""
    target = over_static_shapes("llama", "rounded")
    for _ in range(2):
        slots = target.new_slots(4000)  # larger than any storage before
        slots.append(torch.arange(14))
        assert target.static.takes(slots, 14)
        slots.keep([], after=0)
        target.forward(slots, torch.tensor(prompt()))
        del slots
        gc.collect()


def test_wide_trees_are_captured_in_few_shapes() -> None:
    """Guards against a capture for each number of nodes that a draft has read so far."""
    captured: list[int] = []
    target = LM(lm("llama").model, backend=Backend("counted", static=partial(StaticRunner, capture=counted(captured))))
    shape = BestFirstTree(nodes=64, threshold=0.0)
    drafter = ModelDrafter(target, shape)
    expected = generate(lm("llama"), prompt(), max_new_tokens=LENGTH).tokens
    for depth in (3, 4, 5, 6):
        text = generate(target, prompt(), drafter=drafter, controller=FixedK(depth), max_new_tokens=LENGTH).tokens
        assert text == expected
    assert {target.static._width(rows) for rows in range(73, 193)} == {128, 192}
    assert target.static._width(72) == 72


_COMPILED = """
import functools
import warnings
import torch
from torch._dynamo.utils import counters
from specdecode import LM, BestFirstTree, FixedK, ModelDrafter, NoDraft, PromptLookup, generate
from specdecode.backends import static
from tests.helpers.models import prompt, small

warnings.simplefilter("error")  # as in the suites
# So that texts grow beyond several spans, and need storages of several sizes.
static._SPAN_MULTIPLE, static._LEAST_SLOTS = 32, 32
compile_ = torch.compile
# What is traced, and when again, does not depend on what is made of it. Code is made for one layer alone, which has
# every kind of kernel: a second layer and a draft would double the time. That model is its own draft.
for dtype, compiler, layers in (("double", "eager", 2), ("float", "eager", 2), ("float", "inductor", 1)):
    torch.compile = functools.partial(compile_, backend=compiler)
    plain = LM(getattr(small(num_hidden_layers=layers).model, dtype)())
    target = plain.with_backend("compile")
    draft = plain.subset([layers - 1]).with_backend("compile")
    graphs = [counters["stats"]["unique_graphs"]]
    same = []
    drafters = (NoDraft(), 1, 60), (PromptLookup(), 3, 90), (PromptLookup(branches=3), 9, 30)
    for drafter, k, length in (*drafters, (ModelDrafter(draft), 3, 60), (ModelDrafter(draft, BestFirstTree(8)), 3, 60)):
        rules = {"drafter": drafter, "controller": FixedK(k), "max_new_tokens": length}
        same.append(generate(target, prompt(), **rules).tokens == generate(plain, prompt(), **rules).tokens)
        graphs.append(counters["stats"]["unique_graphs"])
    print(target.backend, graphs, same)
"""


def test_a_compiled_model_is_compiled_twice_and_no_more() -> None:
    """Guards against a compilation, as long as thousands of tokens, each time the text or the draft grows, and against
    a compiled model with other tokens.

    It runs in a process without shape checks, because checks cannot be compiled.
    """
    done = start_python(_COMPILED).wait()
    # Two compilations each for the target and the draft. In float32 both have packed layers.
    told = [f"compile {[4] * 6}", f"compile (packed: 15 linear layers) {[8] * 6}"]
    told.append(f"compile (packed: 8 linear layers) {[10] * 6}")
    printed = re.sub(r" by one\w+", "", done.stdout)
    assert printed.splitlines() == [f"{each} {[True] * 5}" for each in told], done.stderr


_COMPILED_BY_LAYER = """
import functools
import warnings
import torch
from torch._dynamo.utils import counters
from specdecode import LM, FixedK, HeadDrafter, ModelDrafter, PromptLookup, StaticTree, generate
from specdecode.backends import _compiled_by_layer, static
from specdecode.heads.bound import BoundHead, untrained
from specdecode.models.variants import shared_copy
from tests.helpers import families
from tests.helpers.models import ARCHITECTURES, build, prompt

warnings.simplefilter("error")  # as in the suites
# So that texts grow beyond several spans, and need storages of several sizes.
static._SPAN_MULTIPLE, static._LEAST_SLOTS = 32, 32
# What is traced, and when again, does not depend on what is made of it.
torch.compile = functools.partial(torch.compile, backend="eager")


def pair(model):
    # As on a GPU, except that nothing is captured.
    plain, copied = LM(model), shared_copy(model)
    return plain, LM(copied, backend=_compiled_by_layer(copied, lambda: lambda action: action))


def same(plain, target, drafter, k=3, length=30):
    rules = {"controller": FixedK(k), "max_new_tokens": length}
    return generate(target, prompt(), drafter=drafter, **rules).tokens == generate(plain, prompt(), **rules).tokens


def compilations():
    return counters["stats"]["unique_graphs"]


# As wide as a span is long that a text reaches later.
wide = ARCHITECTURES["llama"] | {"hidden_size": 64}
llamas = {count: build(wide | {"num_hidden_layers": count}) for count in (2, 4)}
models = {f"llama of {count}": model for count, model in llamas.items()}
models["gpt-neox"] = build(ARCHITECTURES["gpt-neox"])
models["gemma4"] = families.build("gemma4_text")
models["mixtral"] = families.build("mixtral").float()
models["mixtral"].set_experts_implementation("grouped_mm")
pairs = {}
for name, model in models.items():
    before = compilations()
    pairs[name] = plain, target = pair(model)
    probed = compilations() - before
    equal = [same(plain, target, PromptLookup(), k) for k in (1, 3)]
    print(name, probed, compilations() - before, all(equal))
before, (plain, target) = compilations(), pairs["llama of 4"]
outputs = []
for lm in (plain, target):
    with lm.recording_outputs((0, 2)):
        slots = lm.new_slots(8)
        lm.forward(slots, torch.tensor([3, 1, 4]))
        lm.forward(slots, torch.tensor([1]))
        outputs.append(torch.stack(list(slots.outputs.values())))
print("recorded", compilations() - before, torch.allclose(*outputs, rtol=0, atol=1e-9))
print("subset", same(plain, target, ModelDrafter(target.subset((0, 3)))), compilations() - before)
head = BoundHead(untrained(target), target)
drafters = HeadDrafter(head), HeadDrafter(head, StaticTree((2, 1)))
print("head", all(same(plain, target, drafter) for drafter in drafters), compilations() - before)
"""


def test_one_layer_is_compiled_for_all() -> None:
    """Guards against a compilation for each layer, for each subset of the layers, or for the layers whose hidden states
    a head reads; and against layers that are unlike, but run the same code.

    It runs in a process without shape checks.
    """
    done = start_python(_COMPILED_BY_LAYER).wait()
    assert done.stdout.splitlines() == [
        "llama of 2 2 2 True",
        "llama of 4 0 0 True",
        "gpt-neox 2 2 True",
        "gemma4 8 8 True",
        "mixtral 2 2 True",
        "recorded 0 True",
        "subset True 0",
        "head True 5",
    ], done.stderr


_COMPILED_FOR_A_GPU = """
import functools
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from specdecode.backends.cache_views import StaticCacheView, write_to_slots
from specdecode.backends.compiled import compile_layers


def noting(graph, inputs, options):
    # As the compiler does, before it makes code.
    with config.patch(options):
        traced = make_fx(graph, decomposition_table=select_decomp_table())(*inputs)
    operations = [str(node.target) for node in traced.graph.nodes]
    print(*(sum(name in operation for operation in operations) for name in ("mm", "sum")))
    return graph


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_idx = 0
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, rows, cache):
        return self.down(self.up(rows))


torch.compile = functools.partial(torch.compile, backend=noting)
cache = StaticCacheView({}, {}, torch.arange(1), torch.arange(8), write_to_slots)
layers = nn.ModuleList([Layer()])
compile_layers(layers)
with FakeTensorMode():
    on_gpu = functools.partial(torch.empty, device="cuda", dtype=torch.float16)
    for module in layers.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(on_gpu(weight.shape), requires_grad=False))
    for rows in (1, 2):
        layers[0](on_gpu(1, rows, 64), cache)
"""


def test_a_product_of_one_row_is_compiled_on_a_gpu() -> None:
    """Guards against a library's product of one row, which the compiler cannot fuse and which reads weights at less
    than the full bandwidth. No GPU is needed to see what the compiler is given.
    """
    done = start_python(_COMPILED_FOR_A_GPU).wait()
    assert done.stdout.splitlines() == ["0 2", "2 0"], done.stderr


def test_a_run_that_compiles_is_not_the_timed_one() -> None:
    """Guards against the seconds of a compilation in one of an arm's times, which then decides its speedup."""
    doubled, outputs = torch.compile(lambda numbers: 2 * numbers, backend="eager"), []
    assert timed_by(lambda: outputs.append(doubled(torch.ones(2)))) == (None, False)
    assert len(outputs) == 2
    timed_by(lambda: outputs.append(doubled(torch.ones(2))))
    assert len(outputs) == 3


def test_capturing_is_timed_apart_from_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against seconds of capturing counted as time to the first token, and against captures that no record
    shows.
    """
    done = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    reserved = iter([100, 350])
    stand_ins = {
        "graph_pool_handle": lambda: 7,
        "stream": lambda which: nullcontext(),
        "current_stream": lambda: stream,
        "CUDAGraph": Graph,
        "graph": lambda graph, pool, stream: nullcontext(done.append(f"capture into {pool}")),
        "current_device": lambda: 0,
        "device": nullcontext,
        "synchronize": lambda: time.sleep(0.05),
        "memory_reserved": lambda: next(reserved),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("specdecode.backends.graph._side_stream", lambda device: stream)
    for name in ("count", "seconds", "reserved"):
        monkeypatch.setattr(CudaGraphs, name, 0)

    def action() -> tuple[torch.Tensor, ...]:
        done.append("run")
        return (torch.ones(1),)

    again = CudaGraphs(torch.device("cuda"))(action)
    assert done == ["run", "run", "capture into 7", "run"]
    assert again() is again()
    assert done[4:] == ["replay", "replay"]
    assert (CudaGraphs.count, CudaGraphs.reserved) == (1, 250)
    assert CudaGraphs.seconds >= 0.05

    def slow(self: LM, *given: Any) -> Any:
        CudaGraphs.seconds += 100.0
        return forward(self, *given)

    forward = LM._forward
    monkeypatch.setattr(LM, "_forward", slow)
    result = generate(lm("llama"), prompt(), max_new_tokens=3)
    assert result.capture_s == 300.0
    # No real time here is so long: the subtracted time is the reported capture time.
    assert result.prefill_s < -50.0
    assert result.decode_s < -50.0
    assert all(step.verify_s < -50.0 and step.total_s < -50.0 for step in result.steps)
    assert result.until(2).decode_s == pytest.approx(result.decode_s - result.steps[-1].total_s)


def test_a_step_attends_to_what_is_held(short_spans: None) -> None:
    """Guards against attention over all allocated slots instead of the used span, and against read bytes that are
    counted wrongly.
    """
    read: dict[str, int] = {}
    for backend in ("eager", "direct", "rounded"):
        target = lm("llama") if backend == "eager" else over_static_shapes("llama", backend)
        spans: list[int] = []
        watch = target.model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, given, named, spans=spans: spans.append(named["attention_mask"].shape[-1]), with_kwargs=True
        )
        result = generate(target, prompt(), drafter=PromptLookup(), max_new_tokens=LENGTH)
        watch.remove()
        slot = result.cache_bytes // (len(prompt()) + LENGTH - 1)
        read[backend] = result.attended_bytes // slot
        if backend == "rounded":
            assert {32, 48} <= set(spans) <= {16, 32, 48, 64}
        else:
            assert sum(spans) == read[backend]
    assert read["direct"] == read["eager"] < read["rounded"] < 1.6 * read["eager"]

    # In a batch all rows attend to the slots of the longest, and over no static shapes. One prompt is no batch.
    def attended(results: list[Generation]) -> list[list[int]]:
        return [[step.attended_bytes for step in result.steps] for result in results]

    texts = [prompt(20), prompt(5)]
    for target in (lm("llama"), over_static_shapes("llama", "rounded")):
        results = generate_batch(target, texts, max_new_tokens=3)
        assert attended(results[1:]) == attended(results[:1])
        assert all(step.attended_bytes == step.peak_cache_bytes for step in results[0].steps)
        alone = [generate(target, text, max_new_tokens=3) for text in texts]
        assert attended(generate_batch(target, texts, batch_size=1, max_new_tokens=3)) == attended(alone)
        assert attended(generate_batch(target, texts[:1], max_new_tokens=3)) == attended(alone[:1])


@pytest.mark.parametrize("name", ["llama", "gemma3-window", "gpt-neox"])
def test_heads_that_share_keys_attend_without_copies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a cache that is copied in every step, against a change to other models of the same class, and
    against attention to the keys of the wrong head.
    """
    plain = lm(name)
    grouped = build(ARCHITECTURES[name])
    implementation = plain.model.config._attn_implementation
    shell = shared_copy(grouped)
    group(shell)
    assert shell.config._attn_implementation == GROUPED
    assert grouped.config._attn_implementation == implementation == "sdpa"
    ids = torch.tensor([prompt(30)], device=grouped.device)
    with torch.inference_mode():
        assert (shell(ids).logits - grouped(ids).logits).abs().max() < 1e-12

    target, expected = LM(shell), greedy(name, LENGTH)
    copied: list[int] = []
    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *given: (copied.append(1), repeat(*given))[1])
    rules = {"drafter": PromptLookup(), "max_new_tokens": LENGTH}
    assert generate(target, prompt(), **rules).tokens == expected
    assert not copied
    if name != "gpt-neox":
        generate(plain, prompt(), **rules)
        assert copied, "or this test sees no copies"
    with target.recording_attention():
        assert shell.config._attn_implementation == "eager"
    assert shell.config._attn_implementation == GROUPED


@pytest.mark.parametrize("kind", ["grouped", "by rows"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "mistral-window"])
def test_only_rows_of_a_text_attend_without_a_mask(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a prompt of which all scores are computed and half of them masked, against a node of a tree or a
    token behind earlier slots that sees what it must not, and against a window that a prompt ignores.
    """
    model = build(ARCHITECTURES[name])
    (group if kind == "grouped" else by_rows)(model)
    target, plain = LM(model), lm(name)
    calls: list[tuple[int, bool]] = []
    attention = nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *others: Any, attn_mask: Any = None, is_causal: bool = False, **rest: Any) -> Any:
        calls.append((query.shape[2], is_causal))
        assert not (is_causal and attn_mask is not None)
        return attention(query, *others, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    text, windows = list(prompt(30)), name == "mistral-window"
    tree = DraftTree(torch.tensor([5, 6, 7]), torch.tensor([0, 0, 1]))
    first, expected = target.new_slots(64), plain.new_slots(64)
    # The first node is the next token of a text, too. By rows, the root attends by itself.
    for pending, causal in ((text, 31 if kind == "grouped" else 29), (text[:4], None)):
        calls.clear()
        logits = target.forward_tree(first, pending, tree)
        rows = {rows for rows, is_causal in calls if is_causal}
        assert rows == (set() if windows or causal is None else {causal})
        assert (logits - plain.forward_tree(expected, pending, tree)).abs().max() < 1e-10
        for slots in (first, expected):
            slots.keep([], after=slots.length - len(tree))


def test_a_backend_that_auto_chose_gives_way() -> None:
    """Guards against a model that fails to load because of a backend that only `auto` chose, and against a requested
    backend that is silently replaced.
    """

    def broken(action: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], tuple[torch.Tensor, ...]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    backend = Backend("graph", static=partial(StaticRunner, capture=broken), chosen=True)
    target = LM.on_backend(backend, build(ARCHITECTURES["llama"]), name="llama")
    assert target.backend.name == "eager"
    assert "not graph: llama cannot be decoded exactly" in str(target.backend)
    assert "not permitted when stream is capturing" in str(target.backend)
    assert generate(target, prompt(), max_new_tokens=LENGTH).tokens == greedy("llama", LENGTH)
    with pytest.raises(UnsupportedModelError, match="stream is capturing"):
        LM.on_backend(replace(backend, chosen=False), build(ARCHITECTURES["llama"]))
    # A backend with nothing to change returns the same model, not another with the same weights.
    plain = LM(on_the_cpu("llama").double())
    assert plain.with_backend("auto") is plain
