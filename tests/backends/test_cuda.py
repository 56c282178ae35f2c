"""The CUDA path, on a GPU or on the pretended device: `tox -e pretend`."""

from __future__ import annotations

import functools
import gc
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdecode import (
    LM,
    BestFirstTree,
    FixedK,
    Generation,
    HeadDrafter,
    KeepAll,
    MedusaDrafter,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    Sampling,
    SelfStreamingDrafter,
    SinkWindow,
    StaticTree,
    generate,
    generate_batch,
    load,
    load_mtp,
)
from specdecode.backends import prepare, static
from specdecode.backends.graph import CudaGraphs
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.measure.counters import host_reads
from specdecode.bench.measure.timed import timed, timed_by
from specdecode.core.errors import UnsupportedModelError
from specdecode.decoding.teacher_forced import teacher_forced
from specdecode.drafters.base import Drafter
from specdecode.drafters.medusa import MedusaHeads
from specdecode.drafters.replay import ReplayDrafter
from specdecode.heads.bound import BoundHead, untrained
from specdecode.policies.base import CachePolicy
from specdecode.policies.heavy_hitter import HeavyHitter
from tests.helpers import models
from tests.helpers.heads import write_mtp
from tests.helpers.models import ARCHITECTURES, UNCAPTURED, build, moved, prompt
from tests.helpers.pretended_tensors import DEVICE, host_alone

pytestmark = pytest.mark.skipif(
    torch.device(models.DEVICE).type != "cuda", reason="there is no GPU here, nor a pretended one: tox -e pretend"
)

LENGTH = 32
LAYERS = 3
"""Enough for a draft that skips a layer, and for a head that reads three. Each further layer only repeats them."""
TREE = StaticTree((3, 2, 1))


def model_of(name: str, layers: int = LAYERS) -> PreTrainedModel:
    """Build an architecture of few layers: each operation on the pretended device takes as long as one on a GPU."""
    values = ARCHITECTURES[name]
    kinds = {"layer_types": values["layer_types"][:layers]} if "layer_types" in values else {}
    return build(values | {"num_hidden_layers": layers} | kinds)


@functools.cache
def draft_of(target: LM) -> LM:
    return target.subset([0, 2])


@functools.cache
def head_of(target: LM) -> BoundHead:
    """Bind the target's head only once, as graphs are captured for the storage of its slots."""
    return BoundHead(untrained(target), target)


@functools.cache
def medusa_of(target: LM) -> MedusaHeads:
    """Return heads of random weights, the same for each target."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MedusaHeads(target, 3, 1)


MAKERS: dict[str, Callable[[LM, LM], Drafter]] = {
    "none": lambda target, draft: NoDraft(),
    "lookup": lambda target, draft: PromptLookup(),
    "lookup-tree": lambda target, draft: PromptLookup(branches=3),
    "chain": lambda target, draft: ModelDrafter(draft),
    "static-tree": lambda target, draft: ModelDrafter(draft, TREE),
    "best-first-tree": lambda target, draft: ModelDrafter(draft, BestFirstTree(nodes=8, threshold=0.01)),
    "self-streaming": lambda target, draft: SelfStreamingDrafter(target, 16),
    "head-chain": lambda target, draft: HeadDrafter(head_of(target)),
    "head-tree": lambda target, draft: HeadDrafter(head_of(target), TREE),
    "medusa": lambda target, draft: MedusaDrafter(medusa_of(target)),
    "replay": lambda target, draft: ReplayDrafter(ModelDrafter(draft), on_the_host(), 0.8),
}


def made(name: str, target: LM) -> Drafter:
    return MAKERS[name](target, draft_of(target))


READS = {"best-first-tree": 5}
"""The waits of the host in a step, for drafters that read each drafted level. All others wait once."""


LAUNCHES = {
    "none": 2.1,
    "lookup": 2.1,
    "lookup-tree": 2.3,
    "chain": 8.8,
    "static-tree": 26.3,
    "best-first-tree": 53.1,
    "self-streaming": 54,
    "head-chain": 13.7,
    "head-tree": 38,
    "medusa": 49,
    "replay": 10.1,
}
"""The most kernels that a step launches outside its graphs. The number is the same for any number of layers, but for
"self-streaming", which evicts."""

EVICTION = (14, 25)
"""The kernels that an eviction launches: for each layer, and beside the layers."""

BATCH = {"llama": (43, 52), "gpt-neox": (26, 45)}
"""The kernels that a step of a batch launches, without graphs: for each layer, and beside the layers."""

_MASK = {
    "arange": 2,
    "bitwise_and": 2,
    "bitwise_not": 1,
    "bitwise_or": 1,
    "clamp": 1,
    "ge": 1,
    "index": 1,
    "lt": 2,
    "masked_fill_": 1,
    "sub": 1,
    "zeros": 1,
}
_ROTATION = {"cat": 1, "cos": 1, "sin": 1}
_ATTENTION = {"index_copy_": 2, "neg": 2, "scaled_dot_product_attention": 1}
KERNELS = {
    "llama": (
        _ATTENTION | {"_to_copy": 4, "add": 6, "cat": 3, "mean": 2, "mm": 7, "mul": 9, "pow": 2, "rsqrt": 2, "silu": 1},
        _MASK
        | _ROTATION
        | {"_to_copy": 5, "add": 2, "embedding": 1, "mean": 1, "mm": 1, "mul": 5, "pow": 1, "rsqrt": 1},
    ),
    "gpt-neox": (
        _ATTENTION | {"add": 4, "addmm": 4, "cat": 4, "gelu": 1, "mul": 4, "native_layer_norm": 2},
        _MASK | _ROTATION | {"_to_copy": 3, "add": 1, "embedding": 1, "mm": 1, "mul": 3, "native_layer_norm": 1},
    ),
}
"""The kernels of a captured forward of one row, by operation: those of a layer, and those beside the layers."""

_CHOICE = {"gt": 1, "max": 1, "scalar_tensor": 1, "where": 1}

CLONES = {"llama": 2, "gpt-neox": 1}
"""The copies that a layer makes of several rows, beside those kernels."""

PRETENDED = "tests.helpers.pretended" in sys.modules


@functools.cache
def on_graphs(name: str = "llama", layers: int = LAYERS) -> LM:
    model = model_of(name, layers)
    return LM(model, name=name, backend=prepare("graph", model))


@functools.cache
def eager() -> LM:
    return LM(model_of("llama"))


@functools.cache
def plain(name: str = "llama") -> LM:
    """Return a copy of the model on the CPU. It decodes beside the device: `host_alone`."""
    return LM(model_of(name).cpu(), name=name)


@functools.cache
def on_the_host(name: str = "llama") -> list[int]:
    """Return the prompt and its continuation by a copy of the model on the CPU."""
    model = plain(name)
    with host_alone():
        return [*prompt(), *generate(model, prompt(), max_new_tokens=LENGTH).tokens]


def decode(target: LM, drafter: Drafter, policy: CachePolicy = KeepAll()) -> Generation:
    return generate(target, prompt(), drafter=drafter, controller=FixedK(4), policy=policy, max_new_tokens=LENGTH)


@dataclass(frozen=True)
class Counted:
    """A text that was decoded, and what was counted meanwhile.

    Attributes:
        captures: graphs captured until the end, and meanwhile.
        reads: waits of the host.
        launches: kernels launched outside graphs, by line of the package; only on the pretended device.
    """

    result: Generation
    captures: tuple[int, int]
    reads: int
    launches: Counter[str]


def counted(target: LM, make: Callable[[], Drafter], policy: CachePolicy = KeepAll()) -> Counted:
    gc.collect()  # frees the storages of the previous run for reuse
    drafter = make()
    captures = CudaGraphs.count
    DEVICE.launches.clear()
    with host_reads(target.device) as reads:
        result = decode(target, drafter, policy)
    return Counted(result, (CudaGraphs.count, CudaGraphs.count - captures), reads[0], DEVICE.launches.copy())


def check_launches(run: Counted, most: float) -> None:
    """Check that a step launched at most this many kernels, and not far fewer, outside its graphs."""
    launches = run.launches.total() / len(run.result.steps)
    assert 0.9 * most <= launches <= most, run.launches.most_common(20)


@functools.cache
def replays(name: str) -> list[Counted]:
    """Decode a text three times. A prompt is read by a graph only if its storage has seen one before: so the first two
    runs capture."""
    return [counted(on_graphs(), lambda: made(name, on_graphs())) for _ in range(3)]


@pytest.mark.parametrize("name", MAKERS)
def test_replayed_graphs_write_what_the_cpu_does_and_wait_once_a_step(name: str) -> None:
    """Guards against wrong tokens: from results that another graph has overwritten, from copies that have not arrived,
    or from tensors of two devices. Also against a host that waits or captures more than necessary.
    """
    runs = [*replays(name), counted(eager(), lambda: made(name, eager()))]
    for run in runs:
        assert run.result.tokens == on_the_host()[len(prompt()) :]
    captured, new = runs[2].captures
    assert captured
    assert new == 0
    for run in runs[2:]:
        assert run.reads <= READS.get(name, 1) * len(run.result.steps)


def test_a_sampled_chain_waits_for_few_copies() -> None:
    """Guards against a host that waits for each coin, or for each token that is drafted: it may wait for all tokens and
    chances together, for a rejection, and for the last token.
    """
    target = on_graphs()
    rules = {"sampling": Sampling(0.9, top_k=20, seed=5), "controller": FixedK(4), "max_new_tokens": LENGTH}
    with host_reads(target.device) as reads:
        result = generate(target, prompt(), drafter=ModelDrafter(draft_of(target)), **rules)
    assert 0 < result.accepted < result.drafted
    assert reads[0] <= 3 * len(result.steps)


def test_a_loaded_model_attends_without_cudnn() -> None:
    """Guards against a text that waits up to a second at each new length, where it is measured and told otherwise."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        load("shape:tiny", device=models.DEVICE, backend="eager")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(("name", "most"), LAUNCHES.items())
@pytest.mark.skipif(not PRETENDED, reason="a GPU does not say what was launched on it: tox -e pretend")
def test_a_step_launches_few_kernels_beside_its_graphs(name: str, most: float) -> None:
    """Guards against a GPU that idles because the host launches many kernels: a launch takes as long as a small
    kernel.
    """
    check_launches(replays(name)[-1], most)


@pytest.mark.skipif(not PRETENDED, reason="a GPU does not say what was launched on it: tox -e pretend")
def test_an_mtp_layer_launches_as_few_kernels_as_a_head(tmp_path: Path) -> None:
    """Guards against a layer of a checkpoint that is run without graphs, or by more launches than other heads."""
    folder = write_mtp("mellum", tmp_path)
    # Grouped products of experts do not support float64.
    options = {"dtype": torch.float64, "experts_implementation": "batched_mm"}
    with host_alone():
        host = LM(AutoModelForCausalLM.from_pretrained(folder, **options))
        expected = generate(host, prompt(), max_new_tokens=LENGTH).tokens
    model = moved(AutoModelForCausalLM.from_pretrained(folder, **options), models.DEVICE)
    target = LM(model, backend=prepare("graph", model))
    head = load_mtp(target)
    run = [counted(target, lambda: HeadDrafter(head)) for _ in range(3)][-1]
    assert run.result.tokens == expected
    assert run.captures[1] == 0
    check_launches(run, LAUNCHES["head-chain"])


@pytest.mark.skipif(not PRETENDED, reason="a GPU does not say what was launched on it: tox -e pretend")
def test_an_eviction_launches_few_kernels() -> None:
    """Guards against a policy whose evictions take longer than the forwards between them."""

    def count(layers: int) -> float:
        target, policy = on_graphs(layers=layers), SinkWindow(24, sinks=2)
        evicting = [counted(target, NoDraft, policy) for _ in range(3)][-1]
        keeping = counted(target, NoDraft)
        assert evicting.captures[1] == keeping.captures[1] == 0
        assert evicting.result.compressions > 5
        return (evicting.launches.total() - keeping.launches.total()) / evicting.result.compressions

    two, three = count(2), count(3)
    assert (three - two, 3 * two - 2 * three) == EVICTION


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.skipif(not PRETENDED, reason="a GPU does not say what was launched on it: tox -e pretend")
def test_a_step_of_a_batch_launches_few_kernels_a_layer(name: str) -> None:
    """Guards against operations added to each sequence of a batch, which runs without graphs."""

    def count(layers: int) -> float:
        """Return a quarter of the launches of four further steps. The first runs capture what reads the prompts."""
        totals = []
        for length in (6, 6, 6, 10):
            gc.collect()
            DEVICE.launches.clear()
            generate_batch(on_graphs(name, layers), [prompt(9), prompt(14)], batch_size=2, max_new_tokens=length)
            totals.append(DEVICE.launches.total())
        return (totals[3] - totals[2]) / 4

    two, three = count(2), count(3)
    assert (three - two, 3 * two - 2 * three) == BATCH[name]


@pytest.mark.skipif(not PRETENDED, reason="a GPU does not say what was launched on it: tox -e pretend")
def test_reading_a_prompt_launches_few_kernels_beside_a_graph() -> None:
    """Guards against a first token that waits for the launches of all kernels of all layers."""
    target, host = on_graphs(), plain()
    for _ in range(3):
        gc.collect()
        slots = target.new_slots(300)
        DEVICE.launches.clear()
        logits, forwards = target.read(slots, prompt(200))
        launches = DEVICE.launches.copy()
        del slots
    with host_alone():
        expected, _ = host.read(host.new_slots(300), prompt(200))
    assert forwards == 1
    assert launches.total() <= 3, launches.most_common(20)
    torch.testing.assert_close(torch.tensor(logits.tolist(), dtype=expected.dtype), expected)


def kernels(target: LM, rows: int, chain: int = 0) -> Counter[str]:
    """Count the kernels of a captured forward, by operation.

    Args:
        target: a model on CUDA graphs.
        rows: number of tokens that the forward reads.
        chain: number of forwards of a greedy chain that is captured instead; 0 for none.
    """
    slots = target.new_slots(len(prompt()) + 16)
    target.forward(slots, torch.tensor(prompt()))
    tokens = torch.arange(rows)
    if chain:
        target.continue_greedily(slots, tokens, chain, target.vocab_size)
    else:
        target.forward(slots, tokens, rows=rows, choose=True)
    return Counter(operation.func.__name__.split(".")[0] for operation in DEVICE.replayed)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("forward", ["one row", "eight rows", "chain"])
@pytest.mark.skipif(not PRETENDED, reason="a GPU does not say what a graph holds: tox -e pretend")
def test_a_graph_holds_few_kernels(name: str, forward: str) -> None:
    """Guards against operations added to each layer, or to each forward: on one token, a GPU starts a kernel for longer
    than it computes.
    """

    def count(layers: int) -> Counter[str]:
        target = on_graphs(name, layers)
        if forward == "chain":
            return kernels(target, 1, chain=4) - kernels(target, 1, chain=3)
        return kernels(target, 8 if forward == "eight rows" else 1)

    two, three = count(2), count(3)
    layer = three - two
    most_of_a_layer, most_beside = map(Counter, KERNELS[name])
    if forward == "eight rows":
        most_of_a_layer += Counter(clone=CLONES[name])
    if forward != "chain":
        most_beside += Counter(_CHOICE)
    else:
        most_beside += Counter(argmax=1, add=1)  # the choice of a token, and the place of the next
    for found, most in ((layer, most_of_a_layer), (two - layer - layer, most_beside)):
        assert found == most, f"over the budget: {dict(found - most)}; below it: {dict(most - found)}"


@pytest.mark.parametrize("name", ["gpt-neox", "gemma3-window"])
def test_other_architectures_replay_right(name: str) -> None:
    """Guards against wrong tokens because a captured window or rotation stays as it was at the capture."""
    target = on_graphs(name)
    assert target.backend.name == "graph"
    for drafter in (NoDraft(), ModelDrafter(target.subset([0, 1]), TREE)):
        assert decode(target, drafter).tokens == on_the_host(name)[len(prompt()) :]


def test_policies_batches_and_samples_are_those_of_the_cpu() -> None:
    """Guards against policies, batches or sampling that choose other tokens on a GPU than on the CPU."""
    target, host = on_graphs(), plain()
    texts = [prompt(length) for length in (9, 14)]
    for policy in (SinkWindow(24, sinks=2), HeavyHitter(24)):
        rules = {"policy": policy, "max_new_tokens": LENGTH}
        with host_alone():
            expected = generate(host, prompt(), **rules).tokens
        assert generate(target, prompt(), drafter=PromptLookup(), **rules).tokens == expected
    batch = generate_batch(
        target, texts, batch_size=2, drafter=lambda: ModelDrafter(draft_of(target)), max_new_tokens=LENGTH
    )
    with host_alone():
        alone = [generate(host, text, max_new_tokens=LENGTH).tokens for text in texts]
    assert [result.tokens for result in batch] == alone
    captures = CudaGraphs.count
    batch = generate_batch(target, texts, max_new_tokens=LENGTH)
    assert [result.tokens for result in batch] == alone
    assert CudaGraphs.count == captures, "the tensors of a batch replace those that its prompts were read into"
    rules = {"sampling": Sampling(0.9, top_k=20, seed=5), "max_new_tokens": LENGTH}
    for name in ("chain", "static-tree", "head-tree"):
        with host_alone():
            written = generate(host, prompt(), drafter=MAKERS[name](host, draft_of(host)), **rules).tokens
        assert generate(target, prompt(), drafter=MAKERS[name](target, draft_of(target)), **rules).tokens == written


def test_teacher_forcing_reads_what_has_arrived() -> None:
    """Guards against accepting garbage because the tokens are still on their way to the host."""
    text = on_the_host()

    def steps(target: LM) -> list[tuple[int, int]]:
        forced = teacher_forced(target, text, len(prompt()), drafter=ModelDrafter(draft_of(target)))
        return [(step.place, len(step.logits)) for step in forced]

    host = plain()
    with host_alone():
        expected = steps(host)
    assert steps(on_graphs()) == expected


def test_a_timed_run_captures_nothing() -> None:
    """Guards against captures inside timed runs, also where a text grows beyond the captured shapes."""
    draft = draft_of(on_graphs())
    entries = {
        "chain": {"drafter": "model", "k": 3},
        "tree": {"drafter": "model", "shape": "static", "branching": [2, 2]},
        "streaming": {"drafter": "model", "k": 3, "policy": "sink-window", "cache": 24},
    }
    counts = []

    def noting(run: Callable[..., object]) -> Callable[..., object]:
        def noted(*given: object) -> object:
            before = CudaGraphs.count
            result = run(*given)
            counts.append(CudaGraphs.count - before)
            return result

        return noted

    for name, entry in entries.items():
        arm = make_arm(name, entry, LM(model_of("llama")), LM(draft.model), "graph")
        object.__setattr__(arm, "run", noting(arm.run))
        counts.clear()
        timed(arm, prompt(), LENGTH, ())
        assert counts[0] > 0
        assert counts[-1] == 0, counts
        assert len(counts) <= 3


def test_an_architecture_that_copies_in_its_forward_is_not_captured() -> None:
    """Guards against an exception for an architecture that no longer needs it, and against `auto` that fails on such an
    architecture.
    """
    for name in UNCAPTURED:
        model = model_of(name)
        with pytest.raises(UnsupportedModelError, match="cannot be decoded exactly: its forward does not take"):
            LM(model, backend=prepare("graph", model))
        target = LM.on_backend(prepare("auto", model), model, name=name)
        assert target.backend.name == "eager"
        assert decode(target, PromptLookup()).tokens == on_the_host(name)[len(prompt()) :]


def test_a_model_that_cannot_be_captured_runs_all_the_same() -> None:
    """Guards against `auto` that fails instead of falling back to eager, and against a capture's stream that stays
    current.
    """
    model = model_of("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def reading(x: torch.Tensor) -> torch.Tensor:
        if x.abs().sum().item() < 0:
            raise AssertionError
        return forward(x)

    mlp.forward = reading
    target = LM.on_backend(prepare("auto", model), model, name="reading")
    assert target.backend.name == "eager"
    assert "not graph" in target.backend.note
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert decode(target, PromptLookup()).tokens == on_the_host()[len(prompt()) :]


def test_a_text_that_outgrows_the_least_slots_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a draft whose slots grow during a text, or that takes those of the target: then the graphs of the
    text are captured once more, in runs that are timed.
    """
    monkeypatch.setattr(static, "_LEAST_SLOTS", 16)
    monkeypatch.setattr(static, "_SPAN_MULTIPLE", 32)
    model, text = model_of("llama"), prompt(300)
    target, host = LM(model, backend=prepare("graph", model)), plain()
    with host_alone():
        known = generate(host, text, max_new_tokens=150).tokens
    captures = []

    def decoded(name: str, text: tuple[int, ...], length: int) -> list[int]:
        drafter = ReplayDrafter(MAKERS[name](target, draft_of(target)), [*text, *known], 1.0)
        before = CudaGraphs.count
        tokens = generate(target, text, drafter=drafter, controller=FixedK(12), max_new_tokens=length).tokens
        captures.append(CudaGraphs.count - before)
        return tokens

    for name in ("chain", "static-tree", "self-streaming", "head-chain", "head-tree"):
        for _ in range(2):  # as before all timed runs
            decoded(name, text[:40], 8)
        captures.clear()
        tokens, captured = timed_by(functools.partial(decoded, name, text, len(known)))
        assert (tokens, captured) == (known, False)
        assert len(captures) == 2, (name, captures)
