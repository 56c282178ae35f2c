"""Layers of one target on several devices, and a draft on another device than its target: the tokens are those of one
device. What needs two GPUs also runs on two pretended ones: `tests/test_pretended.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

from specdecode import (
    LM,
    FixedK,
    HeadDrafter,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    Sampling,
    StaticTree,
    UnsupportedModelError,
    generate,
    generate_batch,
    load,
)
from specdecode.backends import Backend, prepare
from specdecode.bench.measure.speed_session import measure
from specdecode.bench.options import Options
from specdecode.bench.plan import resolve
from specdecode.drafters import medusa
from specdecode.drafters.base import Drafter
from specdecode.drafters.replay import ReplayDrafter
from specdecode.heads.bound import BoundHead, head_shape, output_rows, untrained
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.models.devices import DeviceMap
from specdecode.models.recording import recorded_hidden_states
from specdecode.policies import policy
from specdecode.support.environment import hardware
from tests.helpers.characters import save
from tests.helpers.models import ARCHITECTURES, build, moved, prompt
from tests.helpers.pretended_tensors import host_alone

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here, nor pretended ones")

LENGTH = 12
TREE = StaticTree((3, 2, 1))
FIRST, SECOND = "cuda:0", "cuda:1"
HALVES = {
    "model.embed_tokens": FIRST,
    "model.layers.0": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.1": SECOND,
    "model.norm": SECOND,
    "lm_head": SECOND,
}
"""A tiny Llama of two layers, one on each device."""

DRAFTERS: dict[str, Callable[[LM], Drafter]] = {
    "none": lambda target: NoDraft(),
    "chain": lambda target: ModelDrafter(some_layers(target, 1)),
    "tree": lambda target: ModelDrafter(some_layers(target, 0, 1), TREE),
    "replay": lambda target: ReplayDrafter(ModelDrafter(some_layers(target, 1), TREE), [*prompt(), *expected()], 0.7),
    "head": lambda target: HeadDrafter(whole_head(target)),
    "head-tree": lambda target: HeadDrafter(BoundHead(untrained(target), target), TREE),
    "medusa": lambda target: medusa.examples(target)["medusa-chain"],
}


def model_of(name: str = "llama", seed: int = 2, device: str = "cpu") -> PreTrainedModel:
    """Build an architecture of two layers: operations on pretended devices take long."""
    values = ARCHITECTURES[name]
    kinds = {"layer_types": values["layer_types"][:2]} if "layer_types" in values else {}
    return moved(build(values | {"num_hidden_layers": 2} | kinds, seed), device)


@functools.cache
def on_host(name: str = "llama") -> LM:
    """Return the model on the CPU. It decodes beside the devices: `host_alone`."""
    return LM(model_of(name))


@functools.cache
def over_two(name: str = "llama") -> LM:
    """Return the model with one layer on each device."""
    return LM(dispatch_model(model_of(name), HALVES), name="over two")


@functools.cache
def some_layers(target: LM, *layers: int) -> LM:
    """Return a draft: the second layer alone proposes wrong tokens, and both layers propose right ones."""
    return target.subset(layers)


@functools.cache
def whole_head(target: LM) -> BoundHead:
    """Return a head that proposes all tokens, by the output layer of its target."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BoundHead(Eagle3Head(head_shape(target, [0, 1]), torch.arange(target.vocab_size)), target)


def decoded(target: LM, drafter: Drafter = NoDraft(), text: tuple[int, ...] = prompt(), **rules: Any) -> list[int]:
    return generate(target, text, drafter=drafter, controller=FixedK(4), max_new_tokens=LENGTH, **rules).tokens


@functools.cache
def expected(drafter: str = "none", name: str = "llama", text: tuple[int, ...] = prompt(), **rules: Any) -> list[int]:
    """Return the tokens of the model on the CPU."""
    host = on_host(name)
    with host_alone():
        return decoded(host, DRAFTERS[drafter](host), text, **rules)


@several
def test_devices_do_not_mix() -> None:
    """Guards against a pretended device that permits what GPUs do not, or forbids what they permit."""
    first, second = (torch.arange(3, device=device) for device in (FIRST, SECOND))
    for mixed in (
        lambda: first + second,
        lambda: first * second[0],
        lambda: first[second],
        lambda: torch.cat([first, second]),
        lambda: first.index_copy_(0, first, second),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    second += torch.tensor(2)
    first.copy_(second)
    assert (first + second.to(FIRST)).tolist() == [4, 6, 8]


@several
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_layers_on_two_devices_write_what_one_does(drafter: str) -> None:
    """Guards against keys, masks, hidden states or logits that an operation takes from two devices, and against slots
    of the second device that stay where they were when a path is accepted.
    """
    assert {str(weight.device) for weight in over_two().model.parameters()} == {FIRST, SECOND}
    assert decoded(over_two(), DRAFTERS[drafter](over_two())) == expected()


@several
@pytest.mark.parametrize("name", ["sink-window", "key-norm", "heavy-hitter"])
def test_policies_evict_on_two_devices_as_on_one(name: str) -> None:
    """Guards against layers of which only some evict, keys that are rotated by the angles of another device, and
    attention that is counted on one device only.
    """
    rule = policy(name, 16)
    assert expected(policy=rule) != expected()
    assert decoded(over_two(), PromptLookup(branches=2), policy=rule) == expected(policy=rule)


@several
def test_batches_and_samples_on_two_devices_are_those_of_one() -> None:
    """Guards against a batch that keeps keys on one device, and against draws that depend on the devices."""
    texts = [prompt(length) for length in (9, 14)]
    batch = generate_batch(over_two(), texts, drafter=lambda: DRAFTERS["tree"](over_two()), max_new_tokens=LENGTH)
    assert [result.tokens for result in batch] == [expected(text=text) for text in texts]
    assert all(any(step.accepted > 1 for step in result.steps) for result in batch)
    sampling = Sampling(0.9, top_k=20, seed=5)
    for drafter in ("tree", "head-tree"):
        assert expected(drafter, sampling=sampling) != expected()
        assert decoded(over_two(), DRAFTERS[drafter](over_two()), sampling=sampling) == expected(
            drafter, sampling=sampling
        )


@several
def test_masks_by_type_of_layers_on_two_devices() -> None:
    """Guards against masks or rotations of one type of layers that stay on the first device."""
    rule = policy("sink-window", 16)
    assert decoded(over_two("gemma3-window"), PromptLookup(), policy=rule) == expected(
        name="gemma3-window", policy=rule
    )


@several
@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_a_draft_on_another_device_than_its_target(backend: str) -> None:
    """Guards against proposals and their distributions that are compared on two devices, and against graphs that are
    captured on the current device though the model is on another.
    """
    target, draft = (
        LM(model, backend=prepare(backend, model))
        for model in (model_of(device=FIRST), model_of(seed=3, device=SECOND))
    )
    assert (str(target.device), str(draft.device)) == (FIRST, SECOND)
    assert decoded(target, ModelDrafter(draft)) == expected()
    sampling = Sampling(0.9, seed=5)
    host, host_draft = on_host(), LM(model_of(seed=3))
    with host_alone():
        sampled = decoded(host, ModelDrafter(host_draft, TREE), sampling=sampling)
    assert decoded(target, ModelDrafter(draft, TREE), sampling=sampling) == sampled


@several
def test_what_heads_read_is_on_the_device_of_the_inputs() -> None:
    """Guards against training and the doctor, which join the hidden states of several layers."""
    target, tokens = over_two(), torch.arange(5)
    with recorded_hidden_states(target.model, [-1, 0, 1]) as states:
        target.model(tokens[None].to(target.device), use_cache=False)
    assert {state.device for state in states} == {target.device}
    rows = output_rows(target, tokens)
    assert rows.device == target.device
    torch.testing.assert_close(rows.cpu(), on_host().model.lm_head.weight[:5])


@several
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_load_spreads_a_model(tmp_path: Path, quantize: str | None) -> None:
    """Guards against a model that is loaded to one device, and against a backend that cannot run several."""
    how: dict[str, Any] = {"dtype": "float64", "quantize": quantize}
    model_of().save_pretrained(tmp_path)
    target = load(str(tmp_path), **how, device_map=HALVES)
    assert str(target.backend) == "eager (layers over 2 devices)"
    assert target.with_backend("auto") is target
    with pytest.raises(ValueError, match="layers over 2 devices run on the backend eager only"):
        target.with_backend("graph")
    with host_alone():
        plain = load(str(tmp_path), **how, device="cpu", backend="eager")
        written = decoded(plain)
    assert decoded(target, ModelDrafter(load("layers:1", target=target))) == written


@several
def test_the_suite_measures_on_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against models that are loaded to one device under the name of two, and against turns of two arms that
    lose the devices of their layers.
    """
    monkeypatch.setattr("accelerate.utils.get_balanced_memory", lambda *given, **others: {})
    monkeypatch.setattr("accelerate.infer_auto_device_map", lambda *given, **others: HALVES)
    file, model = tmp_path / "own.toml", str(save(tmp_path / "model", layers=2))
    drafted = 'linear = { drafter = "model", k = 2 }\nhf = { peer = "assisted", k = 2 }\n'
    file.write_text(f'prompts = "prose@9:1"\nmax_new_tokens = 9\nrepeats = 1\n[arms]\nar = {{}}\n{drafted}')
    models: dict[str, Any] = {"target": model, "draft": model, "dtype": "float64"}
    devices = {"device_map": "auto", "draft_device": SECOND}
    plan = resolve(Options(root=tmp_path, preset=str(file), until=0.5, budget_minutes=0.01, **models, **devices))
    judged = measure(plan, {"linear", "hf"})
    header = judged.run.header
    assert header.identity.hardware == f"{hardware(torch.device(FIRST))}-layers-x2-draft-on-cuda-1"
    assert (header.devices, header.draft_device, header.on_gpu) == (2, SECOND, True)
    assert header.versions["turns"] == "steps"
    assert f"{model} with {model} on {SECOND}" in judged.title
    assert "backend eager (layers over 2 devices)" in judged.title
    assert {name: (arm.bugs, arm.ties) for name, arm in judged.run.arms.items()} == dict.fromkeys(
        plan.preset.arms, (0, 0)
    )
    assert judged.run.measures("linear").counters.acceptance_rate == 1
    assert plan.setup.load_target().backend == Backend(note="layers over 2 devices")


@several
def test_what_is_spread_is_not_quantised() -> None:
    """Guards against quantised layers that get inputs from another device."""
    with pytest.raises(UnsupportedModelError, match="cannot be quantised: its layers are on several devices"):
        over_two().quantized("int8")


@pytest.mark.parametrize(("device_map", "how"), [({"": "cpu"}, {}), ("auto", {"quantize": "int8", "backend": "eager"})])
def test_a_map_of_one_device_changes_nothing(
    device_map: DeviceMap, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against hooks, or another backend, where all layers are on one device."""
    monkeypatch.setattr("accelerate.utils.get_balanced_memory", lambda *given, **others: {"cpu": 2**30})
    mapped = load("shape:tiny", dtype="float32", device_map=device_map, **how)
    plain = load("shape:tiny", dtype="float32", device="cpu", **how)
    assert mapped.device == torch.device("cpu")
    assert not any(hasattr(module, "_hf_hook") for module in mapped.model.modules())
    assert mapped.backend == plain.backend
    assert decoded(mapped, PromptLookup()) == decoded(plain)


def test_auto_fills_one_device_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against divided layers, inputs on another device than the embeddings, and weights left on the disk."""
    model = model_of()
    model.save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in model.parameters())
    # On the first device accelerate keeps room for another layer.
    memory = {0: int(0.9 * size), 1: size}
    placed: dict[str, Any] = {}
    monkeypatch.setattr("accelerate.utils.get_balanced_memory", lambda *given, **others: memory)
    monkeypatch.setattr("accelerate.dispatch_model", lambda model, places, **how: placed.update(places, **how))
    load(str(tmp_path), dtype="float64", device_map="auto", backend="eager")
    weights = HALVES.keys() - {"model.rotary_emb"}
    assert {name: f"cuda:{placed[name]}" for name in weights} == {name: HALVES[name] for name in weights}
    assert placed["main_device"] == placed["model.embed_tokens"]
    memory = {0: size // 2}
    with pytest.raises(ValueError, match="the devices here cannot hold the whole model"):
        load(str(tmp_path), dtype="float64", device_map="auto")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device_map": "balanced"}, "device_map is 'balanced': 'auto' spreads the layers over all GPUs"),
        ({"device_map": {"": "cpu", "lm_head": "cpu"}}, "device_map names '', the whole model, beside its parts"),
        ({"device_map": {}}, "device_map is {}: 'auto' spreads the layers over all GPUs"),
        ({"device_map": "auto", "tp": "auto"}, "tp='auto' splits each weight, and device_map spreads whole layers"),
        ({"device_map": "auto", "device": "cuda:1"}, "device='cuda:1' is for a model on one device"),
        ({"device_map": "auto", "name": "layers:0-1"}, "'layers:0-1' shares the weights of its target"),
        ({"device_map": "auto", "backend": "graph"}, "run on the backend eager only, and 'graph' is asked for"),
        ({"device_map": {"": "nowhere"}}, "device 'nowhere' cannot be used here"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "device 'disk' cannot be used here"),
        ({"device_map": {"lm_head": "cpu"}, "name": "shape:tiny"}, "does not give any device for the following"),
    ],
)
def test_what_a_device_map_does_not_permit(
    given: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against arguments that contradict each other, and maps that leave weights nowhere."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load(**{"name": "./nowhere", **given})
