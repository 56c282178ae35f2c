"""Whatever runs a forward: the tokens are the same, or rounding alone makes them others."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from specdecode import LM, FixedK, Generation, PromptLookup, Sampling, generate, load
from specdecode.backends import Backend, prepare
from specdecode.backends import packed as packing
from specdecode.backends import static as shapes
from specdecode.backends.packed import PackedLinear
from specdecode.backends.static import Static
from specdecode.bench.arms import make
from specdecode.bench.measure import classify
from specdecode.controller import Controller
from specdecode.drafters.none import NoDraft
from tests import models
from tests.characters import save
from tests.discovery import DRAFTERS, POLICIES, examples
from tests.models import ARCHITECTURES, build, lm, prompt
from tests.strategies import controllers

LENGTH = 40
# Not every architecture can be served by every policy.
SERVED = ("llama", "gpt-neox", "qwen2", "qwen3", "gpt-2", "gemma3-window")


def on_the_cpu(name: str, **values: Any) -> PreTrainedModel:
    """In float32, wherever the other tests have their models."""
    return build(ARCHITECTURES[name] | values).float().cpu()


def replayed(action: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What a CUDA graph does, without one: the action is done on the way, and then leaves each result in the place of
    the one before."""
    result = action()

    def again() -> torch.Tensor:
        return result.copy_(action())

    return again


STATIC = {
    "exact": Backend("exact", static=partial(Static, replay=None)),
    "rounded": Backend("rounded", static=partial(Static, replay=replayed)),
}
if torch.device(models.DEVICE).type == "cuda":
    STATIC["graph"] = prepare("graph", build(ARCHITECTURES["llama"]))


@functools.cache
def over_static_shapes(name: str, backend: str) -> LM:
    return LM(lm(name).model, lm(name).tokenizer, name=name, backend=STATIC[backend])


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts outgrow them."""
    monkeypatch.setattr(shapes, "_SPAN", 16)


@functools.cache
def alone(name: str, policy: str, temperature: float) -> Generation:
    """Plain decoding by transformers' own forwards."""
    sampling = Sampling(temperature, seed=3)
    return generate(lm(name), prompt(), policy=POLICIES[policy], sampling=sampling, max_new_tokens=LENGTH)


@functools.cache
def eager(name: str) -> LM:
    return LM(on_the_cpu(name), name=name)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 65, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_layer(rows: int, bias: bool) -> None:
    """Guards against a layout that holds for the number of rows it was made for and no other, and against a layer that
    needs the weight which it replaced."""
    torch.manual_seed(rows)
    plain = nn.Linear(48, 80, bias)
    packed = PackedLinear(plain)
    exact, own_bias = plain.weight.detach().double(), plain.bias.detach().double() if bias else None
    plain.weight.data.zero_()
    for shape in ((rows, 48), (1, rows, 48), (3, rows, 48)):
        inputs = torch.randn(shape)
        expected = nn.functional.linear(inputs.double(), exact, own_bias)
        output = packed(inputs)
        assert output.shape == expected.shape
        assert (output.double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3-window", "phi3", "opt"])
def test_packed_decoding_is_its_own_plain_decoding(name: str) -> None:
    """Guards against a step that decides otherwise than the packed model itself, row by row, for any other reason than
    rounding, and against decoding that is not packed at all."""
    target = eager(name).with_backend("packed")
    assert target.backend.name == "packed"
    assert sum(isinstance(module, PackedLinear) for module in target.model.modules()) > 8
    alone = generate(target, prompt(), drafter=NoDraft(), max_new_tokens=LENGTH).tokens
    unpacked = generate(eager(name), prompt(), max_new_tokens=LENGTH).tokens
    assert classify(eager(name), prompt(), unpacked, alone) != "bug"
    for drafter in (drafter for file in DRAFTERS for drafter in examples(file, target).values()):
        tokens = generate(target, prompt(), drafter=drafter, controller=FixedK(4), max_new_tokens=LENGTH).tokens
        assert classify(target, prompt(), alone, tokens) != "bug", drafter
    # The classification itself can fail.
    assert classify(target, prompt(), alone, [*alone[:3], (alone[3] + 1) % target.vocab_size, *alone[4:]]) == "bug"


def test_weights_are_packed_once_and_the_plain_ones_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a draft of the target's layers, or an arm, that holds its own copy of the weights; against weights
    held twice after loading; and against bytes that are not counted."""
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
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear)
            held.append(sum(weight() is not None for weight in weights))

    monkeypatch.setattr(packing, "PackedLinear", Watched)
    backend = prepare("packed", model)
    # The last is the head, tied; beside it only those of one module may still be there.
    assert held[-1] < 5 < held[0] - 20, "the plain weights must not wait for the last of them to be packed"
    gc.collect()
    # The head is tied to the embedding, which stays; and is packed beside it.
    assert [weight() is None for weight in weights] == [True] * (len(weights) - 1) + [False]
    embedding = model.get_input_embeddings().weight
    assert LM(model, backend=backend).weight_bytes == before + embedding.nbytes


def test_what_cannot_be_packed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a backend that was asked for and silently is another, and against packing half a model in
    silence."""
    double = prepare("packed", on_the_cpu("llama").double())
    assert double.name == "eager"
    assert str(double) == "eager (not packed: it has no plain linear layers in float32 on a CPU)"
    convolutions = on_the_cpu("gpt-2")
    assert prepare("packed", convolutions).note == "1 linear layers, 16 other matrices as they are"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    without = prepare("packed", on_the_cpu("llama"))
    assert "no oneMKL" in str(without)


@pytest.mark.parametrize(("gain", "name"), [(1.05, "eager"), (1.15, "packed")])
def test_auto_packs_where_that_gains(gain: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against time and memory spent on a layout that is no faster, and against none where it is."""
    times = iter([gain, 1.0])
    monkeypatch.setattr(packing, "_seconds", lambda actions: next(times))
    model = on_the_cpu("llama")
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    assert prepare("auto", model).name == name
    assert next(times, None) is None
    assert (layer.weight in packing._layouts) == (name == "packed")


def test_backends_that_cannot_be(tmp_path: Path) -> None:
    """Guards against a spelling that is taken for another backend, and weights that are quantised where they no longer
    are."""
    folder = str(save(tmp_path / "model"))
    with pytest.raises(ValueError, match="no backend is named 'packd': choose from auto, eager, packed"):
        load(folder, device="cpu", backend="packd")
    target = load(folder, device="cpu", backend="packed")
    assert target.backend.name == "packed"
    with pytest.raises(ValueError, match="cannot be quantised: it runs on the backend packed"):
        target.quantized("int8")
    with pytest.raises(ValueError, match="cannot be given another backend"):
        target.with_backend("auto")
    assert target.with_backend("eager") is target


def test_peers_decode_the_plain_model() -> None:
    """Guards against transformers' own decoding measured with our layers, and against our arms without them."""
    plain = eager("llama")
    packed = plain.with_backend("packed")
    for entry, expected in (({"drafter": "lookup"}, packed), ({"drafter": "lookup", "backend": "eager"}, plain)):
        assert make("arm", entry, plain, None, "packed").target is expected
    peer = make("peer", {"peer": "generate"}, plain, None, "packed")
    assert peer.target is plain
    ran = []
    for module in packed.model.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda *_: ran.append(1))
    peer.run(prompt(), 4, ())
    assert not ran
    run = make("ours", {"drafter": "model", "k": 2}, plain, plain.subset([0]), "packed").run(prompt(), 4, ())
    assert ran
    assert run.tokens == generate(packed, prompt(), drafter=PromptLookup(), max_new_tokens=4).tokens


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    """Guards against padding that is attended to or writes over what is held, keys in the wrong slots, a capture that
    is used for another shape or for slots that have moved, and masks that forget a window."""
    assume(policy == "keep-all" or name in SERVED)
    target = over_static_shapes(name, backend)
    drafters = list(examples(file, target).values())
    # Where sampling is not greedy a draft may change which of the equally lawful texts is drawn.
    drafter = drafters[which % len(drafters)] if temperature == 0.0 else NoDraft()
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
