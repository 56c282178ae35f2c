"""Draft heads: the hidden states that they read, their proposals, and their files."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from specdecode import (
    LM,
    BestFirstTree,
    Cascade,
    Chain,
    DraftTree,
    FixedK,
    HeadDrafter,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    ReplayDrafter,
    Sampling,
    SinkWindow,
    StaticTree,
    UnsupportedModelError,
    generate,
    generate_batch,
    load,
    load_head,
    measure_costs,
)
from specdecode.backends import Backend
from specdecode.backends.packed import PackedLinear
from specdecode.backends.static import StaticRunner
from specdecode.bench import plan
from specdecode.bench.arms import parts
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.arms.snippet import code_snippet
from specdecode.bench.gate.verdicts import Verdict, judge
from specdecode.bench.measure.experiment import experiment
from specdecode.bench.options import Options
from specdecode.bench.runs.records import Header, Identity, RunFile
from specdecode.controllers.base import Limit
from specdecode.controllers.cost_aware import Costs, DraftCost
from specdecode.core.errors import ModelFileError
from specdecode.core.sampling import Rng
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.tree_shapes import TreeShape
from specdecode.heads import loading
from specdecode.heads.bound import BoundHead, output_rows, untrained
from specdecode.heads.eagle3 import Eagle3Head
from specdecode.heads.eagle3_files import WEIGHTS, describe, make_eagle3, read_eagle3
from specdecode.heads.loading import shipped_head
from specdecode.heads.wirings import likely_wirings
from specdecode.models import forwards
from specdecode.models.embedded import EMBEDDED
from specdecode.models.forwards import ForwardInput
from specdecode.models.recording import recorded_hidden_states
from tests.helpers import families
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.heads import write_head
from tests.helpers.models import ARCHITECTURES, build, greedy, lm, prompt, small
from tests.helpers.replayed import replayed
from tests.helpers.speed_runs import speed_arm, speed_run
from tests.helpers.suites import start_python
from tests.helpers.trees import paths

LENGTH = 36
LAYERS = (0, 2)
SHAPES = (Chain(), StaticTree((3, 2, 1)), BestFirstTree(nodes=12, threshold=0.001))
BACKENDS = {
    "eager": Backend(),
    "exact": Backend("exact", static=partial(StaticRunner, capture=None)),
    "rounded": Backend("rounded", static=partial(StaticRunner, capture=replayed)),
}


@dataclass
class Watching:
    """A drafter that proposes the same as another, and records its inputs."""

    inner: Drafter
    layers: tuple[int, ...] = LAYERS
    seen: list[tuple[list[int], Tensor | None]] = field(default_factory=list)

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        states = None if context.hidden_states is None else context.hidden_states.clone()
        self.seen.append((list(context.tokens), states))
        return self.inner.propose(context, limit)


def hidden_states(target: LM, tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
    """Return the hidden states of these layers by transformers, by a forward without a cache. [n, F]"""
    ids = torch.tensor([list(tokens)], device=target.device)
    with torch.inference_mode():
        told = target.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat([told[layer + 1][0] for layer in layers], -1)


def half_right(name: str, shape: TreeShape, text: Sequence[int]) -> ReplayDrafter:
    return ReplayDrafter(ModelDrafter(lm(name).subset([0]), shape), text, acceptance=0.6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3-window"])
def test_recorded_hidden_states_are_those_of_a_forward(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a head that drafts badly because its hidden states are of rejected nodes, of padding, of another
    layer, of the forward before, or lost between the chunks of a prompt. No output token would show it.
    """
    monkeypatch.setattr(forwards, "PREFILL_CHUNK", 5)
    target = LM(lm(name).model, backend=BACKENDS[backend])
    text = [*prompt(), *greedy(name, LENGTH)]
    truth = hidden_states(target, text, LAYERS)
    for shape in (Chain(), StaticTree((3, 2, 1))):
        drafter = Watching(half_right(name, shape, text))
        result = generate(target, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=LENGTH)
        assert result.tokens == greedy(name, LENGTH)
        assert len(result.accepted_lengths) >= 3
        first, *later = drafter.seen
        assert first[1] is None
        assert len(later) > 8
        for tokens, states in later:
            assert states is not None
            torch.testing.assert_close(states, truth[: len(tokens) - 1], rtol=0, atol=1e-9)


def test_hidden_states_are_those_of_all_tokens_where_layers_share_keys() -> None:
    """Guards against a head that cannot draft for Gemma 4: of tokens without logits, transformers leaves out the layers
    that read other layers' keys.
    """
    target, drafter = LM(families.build("gemma4_text")), Watching(PromptLookup())
    result = generate(target, prompt(), drafter=drafter, max_new_tokens=LENGTH)
    truth = hidden_states(target, [*prompt(), *result.tokens], LAYERS)
    for tokens, states in drafter.seen[1:]:
        assert states is not None
        torch.testing.assert_close(states, truth[: len(tokens) - 1], rtol=0, atol=1e-9)
    assert len(drafter.seen) > 8


def test_each_prompt_of_a_batch_has_its_own_hidden_states() -> None:
    """Guards against rows of a batch that are mixed up or begin with padding, and against the layers of another
    prompt's drafter.
    """
    target = lm("llama")
    prompts = [list(prompt(14)), list(prompt(9)[::-1]), list(prompt(23))]
    plain = generate_batch(target, prompts, max_new_tokens=LENGTH)
    layers = [(0, 2), (), (1, 2)]
    texts = [[*start, *result.tokens] for start, result in zip(prompts, plain, strict=True)]
    drafters = [Watching(half_right("llama", Chain(), text), own) for text, own in zip(texts, layers, strict=True)]
    results = generate_batch(target, prompts, batch_size=2, drafter=iter(drafters).__next__, max_new_tokens=LENGTH)
    assert [result.tokens for result in results] == [result.tokens for result in plain]
    for drafter, text, own in zip(drafters, texts, layers, strict=True):
        (_, first), *later = drafter.seen
        assert first is None
        for tokens, states in later:
            assert (states is None) == (not own)
            if states is not None:
                truth = hidden_states(target, text, own)[: len(tokens) - 1]
                torch.testing.assert_close(states, truth, rtol=0, atol=1e-9)


def test_hidden_states_outlive_what_is_evicted() -> None:
    """Guards against a drafter that loses the hidden states of tokens evicted from the target's cache, or gets those of
    others.
    """
    policy = SinkWindow(15, sinks=2, trigger=0.5, interval=8)
    plain = generate(lm("llama"), prompt(), policy=policy, max_new_tokens=LENGTH)
    text = [*prompt(), *plain.tokens]
    drafter = Watching(half_right("llama", StaticTree((3, 2)), text))
    result = generate(
        lm("llama"), prompt(), drafter=drafter, controller=FixedK(3), policy=policy, max_new_tokens=LENGTH
    )
    assert result.tokens == plain.tokens
    assert result.compressions >= 3
    _, last = drafter.seen[-1]
    assert last is not None
    for before, states in drafter.seen[1:]:
        assert states is not None
        assert len(states) == len(before) - 1
        assert torch.equal(states, last[: len(states)])
    truth = hidden_states(lm("llama"), text, LAYERS)[: len(last)]
    same = (last - truth).abs().amax(1) < 1e-9
    # They equal the full cache's up to the first eviction, and never after it. None is missing or added.
    assert same.tolist() == [True] * int(same.sum()) + [False] * int((~same).sum())
    assert 8 <= int(same.sum()) < len(last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_leaves_nothing_behind(backend: str) -> None:
    """Guards against hooks that slow down plain decoding, or keep memory, after a head has drafted, and against hooks
    that the next head lacks.
    """
    target = LM(build(ARCHITECTURES["llama"]), backend=BACKENDS[backend])
    head = BoundHead(untrained(target), target)
    for drafter in (NoDraft(), HeadDrafter(head), NoDraft(), HeadDrafter(head)):
        result = generate(target, prompt(), drafter=drafter, max_new_tokens=LENGTH)
        assert result.tokens == greedy("llama", LENGTH)
        assert bool(result.drafted) == bool(drafter.layers)
        assert not any(module._forward_hooks for module in target.model.modules())
    slots = target.new_slots(8)
    for _ in range(2):
        target.forward(slots, torch.tensor([1, 2, 3]))
        assert not slots.outputs


def test_outputs_of_layers_that_there_are_not() -> None:
    """Guards against an obscure error where a head names a layer that the target lacks."""
    with (
        pytest.raises(ValueError, match=r"layers 0 to 3: the outputs of \[1, 4\] cannot be read"),
        lm("llama").recording_outputs([1, 4]),
    ):
        pass
    model = build(ARCHITECTURES["llama"])
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="no list of layers"), recorded_hidden_states(model, [0]):
        pass


VOCABULARY = 11
TEXT = [3, 8, 1, 3, 8, 9, 4, 1, 3, 8]
SAMPLING = Sampling(0.9, top_k=4)


@functools.cache
def target() -> LM:
    return small(seed=3, vocab_size=VOCABULARY, num_hidden_layers=2)


@functools.cache
def raw() -> Eagle3Head:
    """Return a head of sharp distributions, so that a small error shows.

    It cannot propose all tokens, and its ids are in another order.
    """
    head = untrained(target(), seed=5).double()
    with torch.no_grad():
        for weight in head.parameters():
            weight.mul_(3.0)
    head.tokens = torch.tensor([9, 0, 4, 7, 3, 8, 1])
    return head


def context(tokens: Sequence[int], sampling: Sampling) -> Context:
    states = hidden_states(target(), tokens, raw().shape.layers[:1])
    with recorded_hidden_states(target().model, raw().shape.layers) as outputs, torch.inference_mode():
        target().model(torch.tensor([list(tokens)], device=target().device), use_cache=False)
    assert torch.equal(torch.cat(outputs, -1)[0, :, : states.shape[1]], states)
    return Context(list(tokens), VOCABULARY, sampling, Rng(0), torch.cat(outputs, -1)[0, :-1])


@torch.inference_mode()
def distribution_after(path: Sequence[int], sampling: Sampling) -> Tensor:
    """Return the head's distribution behind the text and a path of proposals, without slots. [V]

    Each token reads everything again.
    """
    head, embedding = raw(), target().model.get_input_embeddings()
    given = context(TEXT, sampling).hidden_states
    assert given is not None
    states = head.fused(given.cpu())
    for read in range(len(path) + 1):
        text = [*TEXT, *path[:read]]
        count = len(text) - 1
        out = head(
            embedding(torch.tensor(text[1:], device=target().device)).cpu()[None],
            states[None],
            torch.arange(1, count + 1),
            lambda keys, values, layer: (keys, values),
            torch.ones(count, count, dtype=torch.bool).tril(),
        )[0]
        states = torch.cat([states, out[-1:]])
    logits = torch.full((VOCABULARY,), -torch.inf, dtype=torch.float64)
    logits[head.tokens] = head.logits(out[-1:], output_rows(target(), head.tokens).cpu())[0]
    return sampling.probs(logits)


def read_twice(shape: TreeShape, sampling: Sampling, limit: Limit) -> DraftTree:
    """Return the proposal of a head that has already drafted for two beginnings of the text."""
    drafter = HeadDrafter(BoundHead(raw(), target()), shape)
    for length in (4, 8):
        drafter.propose(context(TEXT[:length], sampling), limit)
    return drafter.propose(context(TEXT, sampling), limit)


def test_a_greedy_chain_is_the_head_s_own_continuation() -> None:
    """Guards against a token that is read with another's hidden states, at the wrong position or not at all, and ids of
    the head read as the target's.
    """
    text: list[int] = []
    for _ in range(5):
        text.append(int(distribution_after(text, Sampling()).argmax()))
    tree = read_twice(Chain(), Sampling(), Limit(5))
    assert paths(tree)[-1] == text
    assert len({*text}) > 1


@pytest.mark.parametrize("shape", [StaticTree((3, 2, 2), nodes=64), BestFirstTree(9, 0.0)], ids=str)
def test_a_greedy_tree_holds_the_most_probable_tokens(shape: TreeShape) -> None:
    """Guards against nodes that read their uncle's state instead of their parent's, or see their cousins."""
    tree = read_twice(shape, Sampling(), Limit(3))
    if isinstance(shape, StaticTree):
        expected: list[list[int]] = []
        level: list[list[int]] = [[]]
        for count in (3, 2, 2):
            level = [
                [*path, token]
                for path in level
                for token in distribution_after(path, Sampling()).topk(count).indices.tolist()
            ]
            expected += level
        assert paths(tree) == expected
        return
    probability: dict[tuple[int, ...], float] = {}
    above: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        above = {
            (*path, token): p * q
            for path, p in above.items()
            for token, q in enumerate(distribution_after(path, Sampling()).tolist())
        }
        probability |= above
    best = sorted(probability, key=lambda path: -probability[path])[:9]
    assert sorted(map(tuple, paths(tree))) == sorted(best)


@pytest.mark.parametrize("shape", [Chain(), StaticTree((3, 2, 1)), StaticTree((9, 1))], ids=str)
def test_a_sampled_tree_carries_the_distributions_that_it_was_drawn_from(shape: TreeShape) -> None:
    """Guards against a distribution over the head's tokens passed on as one over the target's, or of another node than
    the parent.
    """
    tree = read_twice(shape, SAMPLING, Limit(3))
    assert tree.probs is not None
    assert tree.depth > 1
    for path, distribution, parent, node in zip(
        paths(tree), tree.probs, tree.parents.tolist(), range(len(tree)), strict=True
    ):
        earlier = [int(tree.tokens[i]) for i in range(node) if tree.parents[i] == parent]
        expected = distribution_after(path[:-1], SAMPLING).index_fill(0, torch.tensor(earlier, dtype=torch.long), 0.0)
        torch.testing.assert_close(distribution.cpu(), expected / expected.sum(), rtol=0, atol=1e-9)


def test_without_hidden_states_nothing_is_proposed() -> None:
    """Guards against a head that drafts without hidden states where the target has not read the text, and against wrong
    state once it has.
    """
    drafter = HeadDrafter(BoundHead(raw(), target()))
    whole = context(TEXT, Sampling())
    assert whole.hidden_states is not None
    assert not len(drafter.propose(Context(TEXT, VOCABULARY, Sampling(), Rng(0)), Limit(3)))
    short = Context(TEXT, VOCABULARY, Sampling(), Rng(0), whole.hidden_states[:-1])
    assert not len(drafter.propose(short, Limit(3)))
    assert not len(drafter.propose(context(TEXT[:1], Sampling()), Limit(3)))
    assert drafter.forwards == 0
    assert paths(drafter.propose(whole, Limit(3))) == paths(read_twice(Chain(), Sampling(), Limit(3)))


@functools.cache
def taught() -> Eagle3Head:
    """Return a head that knows how the tiny llama continues the prompt, as far as it can propose the tokens."""
    model, text = lm("llama"), [*prompt(), *greedy("llama", LENGTH)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = untrained(model).double()
    head.tokens = torch.tensor(sorted({*text[: -LENGTH // 4]}))
    place = {token: i for i, token in enumerate(head.tokens.tolist())}
    next_ = torch.tensor([place.get(token, -100) for token in text[2:]])
    with recorded_hidden_states(model.model, head.shape.layers) as outputs, torch.no_grad():
        ids = torch.tensor([text], device=model.device)
        model.model(ids, use_cache=False)
        embedded = model.model.get_input_embeddings()(ids)[:, 1:-1].cpu()
    states = torch.cat(outputs, -1)[:, :-2].cpu()
    rows = output_rows(model, head.tokens).cpu()
    count = states.shape[1]
    reads = (
        torch.arange(1, count + 1),
        lambda keys, values, layer: (keys, values),
        torch.ones(count, count).tril().bool(),
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(120):
        first = head(embedded, head.fused(states), *reads)
        # A proposal's successor reads the head's state instead of hidden states.
        second = head(embedded, torch.cat([head.fused(states)[:, :1], first[:, :-1]], 1), *reads)
        losses = [cross_entropy(head.logits(out, rows)[0], next_) for out in (first, second)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return head


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.002, seed=1)], ids=["greedy", "sampling"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_a_head_that_was_taught_is_accepted(shape: TreeShape, sampling: Sampling) -> None:
    """Guards against a head that is right in training but reads other inputs when it drafts: nothing would be
    accepted.
    """
    target = lm("llama")
    drafter = HeadDrafter(BoundHead(taught(), target), shape)
    result = generate(target, prompt(), drafter=drafter, controller=FixedK(3), sampling=sampling, max_new_tokens=LENGTH)
    if sampling.greedy:
        assert result.tokens == greedy("llama", LENGTH)
        assert result.mean_acceptance_length > 2.0
        assert result.rejections > 0
    else:
        assert result.accepted > 0
    assert 0 < result.draft_forwards <= 3 * len(result.steps)


def test_a_head_reads_the_text_once() -> None:
    """Guards against a head that reads the whole text again in every step, which no proposal shows."""
    target, widths = lm("llama"), []
    head = BoundHead(taught(), target)
    head._head.register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[1]))
    result = generate(target, prompt(), drafter=HeadDrafter(head), controller=FixedK(3), max_new_tokens=LENGTH)
    assert len(widths) == result.draft_forwards
    # First the prompt and the first token. Then the accepted tokens with the one behind them, and the draft one by one.
    assert widths[0] == len(prompt())
    assert sum(widths) <= len(prompt()) + LENGTH + 2 * len(result.steps)


def logits_at(head: BoundHead, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the logits of a head that reads one token, with hidden states of ones before it."""
    alone = ForwardInput(torch.tensor([1]), torch.tensor([1]), torch.ones(1, 1, dtype=torch.bool), rows=1)
    states = torch.ones(1, width, dtype=dtype, device=head.tokens.device)
    return head.read(head.new_slots(1), alone, states, fuse=True)[1]


def test_a_head_comes_back_from_its_file(tmp_path: Path) -> None:
    """Guards against weights that are lost or swapped in the file, and a model card that cannot be read."""
    file = write_head(lm("llama"), tmp_path, taught(), shared_output=True)
    files = read_eagle3(file)
    assert files.card == {"seed": 7}
    assert files.fingerprint is not None
    assert files.fingerprint.target == "llama"
    head = make_eagle3(files, 4, 32)
    assert describe(head.shape) == describe(taught().shape)
    assert torch.equal(head.tokens, taught().tokens)
    for name, weight in taught().named_parameters():
        assert torch.equal(head.get_parameter(name), weight.half().float())
    results = [
        generate(lm("llama"), prompt(), drafter=HeadDrafter(each), max_new_tokens=LENGTH)
        for each in (load_head(str(file), lm("llama")), BoundHead(taught(), lm("llama")))
    ]
    assert results[0].tokens == results[1].tokens == greedy("llama", LENGTH)
    assert results[0].mean_acceptance_length > 2.0


def test_a_head_knows_its_target_in_any_type(tmp_path: Path) -> None:
    """Guards against a head that is refused, or computes something else, where its target has another dtype or
    backend.
    """
    file = str(write_head(lm("llama"), tmp_path, taught()))
    plain = LM(build(ARCHITECTURES["llama"]).float().cpu(), name="elsewhere")
    packed = plain.with_backend("packed")
    targets = [plain, packed, LM(build(ARCHITECTURES["llama"]).bfloat16(), name="half")]
    for target in targets:
        head = load_head(file, target)
        assert logits_at(head, 96, target.dtype).dtype == target.dtype
        result = generate(target, prompt(), drafter=HeadDrafter(head, StaticTree((2, 2))), max_new_tokens=LENGTH)
        assert result.accepted > 5
    assert isinstance(load_head(file, packed)._rows, PackedLinear)
    assert isinstance(load_head(file, packed)._head.fc, PackedLinear)
    for tokens in (torch.tensor([5, 0, 60]), torch.arange(97)):
        own = plain.model.get_output_embeddings().weight[tokens]
        torch.testing.assert_close(output_rows(packed, tokens), own, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: lm("llama", 5), "head is a head for llama and cannot draft for llama, as its embeddings"),
        (lambda: lm("llama").subset([0, 1]), r"for llama\[2 of 4 layers\], as it has 2 layers, 97 tokens"),
        (lambda: target(), "as it has 2 layers, 11 tokens and embeddings of width 8, not 4 layers, 97 tokens"),
    ],
    ids=["seed", "layers", "sizes"],
)
def test_a_head_of_another_target_is_refused(other: functools.partial[LM], reason: str, tmp_path: Path) -> None:
    """Guards against a head that silently proposes noise, because it was trained for another model."""
    file = write_head(lm("llama"), tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_head(str(file), other())


def test_a_bound_head_stays_what_it_was() -> None:
    """Guards against changing drafts because a head is trained further while it is measured."""
    target, head = lm("llama"), untrained(lm("llama"))
    bound = BoundHead(head, target)
    before = logits_at(bound, 96)
    with torch.no_grad():
        head.norm.weight.mul_(2.0)
    assert torch.equal(logits_at(bound, 96), before)
    assert not torch.equal(logits_at(BoundHead(head, target), 96), before)


def test_rows_of_an_output_embedding_are_without_its_bias() -> None:
    """Guards against a bias that is added to every column of a head's logits."""
    target = lm("phi")
    layer = target.model.get_output_embeddings()
    tokens = torch.tensor([3, 1, 40])
    assert layer.bias is not None
    with torch.no_grad():
        usual = layer.bias.clone()
        layer.bias.uniform_(1.0, 2.0)
        rows = output_rows(target, tokens)
        layer.bias.copy_(usual)
    torch.testing.assert_close(rows, layer.weight[tokens.to(layer.weight.device)].detach(), rtol=0, atol=1e-12)


def test_a_head_that_cannot_be_bound_is_refused() -> None:
    """Guards against an obscure error where no file says which target a head is for."""
    with pytest.raises(UnsupportedModelError, match=r"layers 0, 1 of width 8 .* as it has 4 layers of width 32"):
        BoundHead(raw(), lm("llama"))
    head = copy.deepcopy(raw())
    head.tokens = torch.tensor([2, VOCABULARY])
    with pytest.raises(UnsupportedModelError, match="up to 11 cannot draft for small, as it knows tokens 0 to 10"):
        BoundHead(head, target())
    head.tokens = torch.tensor([2, 9])
    head.embed_tokens = torch.nn.Embedding(9, head.shape.hidden)
    with pytest.raises(
        UnsupportedModelError, match="up to 9 cannot draft for small, as the head itself embeds tokens 0 t"
    ):
        BoundHead(head, target())
    narrow = LM(build(ARCHITECTURES["opt"] | {"word_embed_proj_dim": 16}), name="narrow")
    with pytest.raises(UnsupportedModelError, match="narrow, as it embeds tokens in width 16"):
        BoundHead(untrained(narrow), narrow)


SIX_HEADS = ARCHITECTURES["mistral-window"] | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (lambda: build(ARCHITECTURES["llama"]), (4, 2, 8, 48)),
        (lambda: build(SIX_HEADS), (4, 1, 8, 48)),
        (lambda: families.build("cohere2_moe"), (4, 2, 8, 48)),
        (lambda: families.build("gemma4_unified_text"), (4, 1, 16, 48)),
    ],
    ids=["llama", "six heads", "no eps", "by layer"],
)
def test_a_head_has_sizes_of_its_target_that_a_llama_can_have(
    model: Callable[[], PreTrainedModel], sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """Guards against a traceback for a target such as GLM-4.5-Air, whose 96 heads do not divide its width of 4096, or
    Gemma 4, whose layers have heads of two widths.
    """
    target = LM(model())
    decoder = untrained(target).shape.decoder
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert tuple(getattr(decoder, name) for name in names) == sizes
    drafter = HeadDrafter(BoundHead(untrained(target), target))
    assert generate(target, prompt(), drafter=drafter, max_new_tokens=8).drafted > 0
    wirings = likely_wirings(read_eagle3(write_head(target, tmp_path)), target)
    assert any(f"of width {sizes[2]}, as the target's" in wiring.name for wiring in wirings)


def test_a_target_whose_layers_differ_in_size_is_refused() -> None:
    """Guards against a traceback where a head is trained for it."""
    with pytest.raises(UnsupportedModelError, match=r"have the sizes of Gemma3n.*'intermediate_size'") as raised:
        untrained(LM(families.build("gemma3n_text")))
    assert "\n" not in str(raised.value)


def test_a_path_names_no_head_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a folder that is ignored since it has the name of a model, and against files beside a model."""
    monkeypatch.chdir(tmp_path)
    write_head(lm("llama"), tmp_path).rename(tmp_path / EMBEDDED)
    assert load_head(f"./{EMBEDDED}", lm("llama")).vocab_size == lm("llama").vocab_size
    (tmp_path / "model-head").mkdir()
    assert shipped_head(str(tmp_path / "model")) is None
    assert shipped_head(EMBEDDED) is not None


def test_a_damaged_file_is_reported_in_a_sentence(tmp_path: Path) -> None:
    """Guards against a traceback, and a head that drafts with half of its weights."""
    folder = write_head(lm("llama"), tmp_path)
    file = folder / WEIGHTS
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", whole.replace(b"shape", b"shepe")):
        file.write_bytes(damaged)
        with pytest.raises(ModelFileError, match=r"cannot read the draft head .*head: "):
            load_head(str(folder), lm("llama"))
    file.write_bytes(whole.replace(b"q_proj", b"q_prof"))
    with pytest.raises(ModelFileError, match=r"does not fit its config\.json: it lacks .*q_proj.* and has .*q_prof"):
        load_head(str(folder), lm("llama"))
    with pytest.raises(ModelFileError, match=r"model\.safetensors holds no config\.json: name the folder of a head"):
        load_head(str(file), lm("llama"))
    with pytest.raises(ModelFileError, match="there is no draft head 'llama': name the folder"):
        load_head("llama", lm("llama"))


def test_what_a_head_costs_is_measured() -> None:
    """Guards against a head whose measured cost is zero because it has no hidden states to read."""
    proposed = []

    class Listening(Watching):
        def propose(self, context: Context, limit: Limit) -> DraftTree:
            tree = self.inner.propose(context, limit)
            proposed.append((tree.depth, limit.depth))
            return tree

    for target in (lm("llama"), LM(build(ARCHITECTURES["gpt-2"] | {"n_positions": 20}))):
        inner = HeadDrafter(BoundHead(untrained(target), target))
        costs = measure_costs(target, Listening(inner, inner.layers))
        assert all(depth == asked for depth, asked in proposed)
        assert costs.draft.keys() == {Limit(depth) for depth in (1, 2, 4, 8)}
        assert inner.forwards >= len(proposed)


_COMPILED = """
import functools
import warnings
import torch
from torch._dynamo.utils import counters
from specdecode import FixedK, PromptLookup, generate
from tests.helpers.models import prompt, small

warnings.simplefilter("error")  # as in the suites
# What is traced, and when again, does not depend on what is made of it, which would take minutes.
torch.compile = functools.partial(torch.compile, backend="eager")
plain = small(num_hidden_layers=2)
target = plain.with_backend("compile")
graphs, same = [counters["stats"]["unique_graphs"]], []
for layers in ((), (0,), (), (1,), (0,), ()):
    seen = {}
    for lm in (plain, target):
        class Watching(PromptLookup):
            def propose(self, context, limit):
                seen.setdefault(lm, []).append(context.hidden_states)
                return super().propose(context, limit)
        drafter = Watching()
        drafter.layers = layers
        seen[lm, "tokens"] = generate(lm, prompt(), drafter=drafter, controller=FixedK(3), max_new_tokens=30).tokens
    same.append(seen[plain, "tokens"] == seen[target, "tokens"])
    for own, compiled in zip(seen[plain], seen[target], strict=True):
        same.append(own is compiled is None or torch.allclose(own, compiled, rtol=0, atol=1e-9))
    graphs.append(counters["stats"]["unique_graphs"])
print(graphs, all(same))
"""


def test_compiled_hidden_states_are_of_the_layers_that_are_asked_for() -> None:
    """Guards against compiled code that is reused though other layers, or none, are requested, which PyTorch does not
    see, and against compiling again for every text.

    It runs in a process without shape checks.
    """
    done = start_python(_COMPILED).wait()
    assert done.stdout.splitlines() == [f"{[2, 2, 4, 4, 6, 6, 6]} True"], done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def file(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_head(load(model, device="cpu", dtype="float64"), tmp_path_factory.mktemp("head")))


def test_heads_from_the_command_line(
    model: str, file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against options that do not reach the head, and a target's own head that is not used."""
    depths: list[int] = []
    propose = HeadDrafter.propose

    def listening(self: HeadDrafter, context: Context, limit: Limit) -> DraftTree:
        tree = propose(self, context, limit)
        depths.append(len(tree) - tree.depth)
        return tree

    monkeypatch.setattr(HeadDrafter, "propose", listening)
    shipped: dict[str, Path] = {}
    monkeypatch.setattr(loading, "shipped_head", shipped.get)
    arguments = (
        "generate",
        "the cat sat on the cat sat on",
        "--target",
        model,
        "--dtype",
        "float64",
        "--max-new-tokens",
        "20",
    )
    assert exit_code(monkeypatch, *arguments, "--drafter", "none") == 0
    plain = capfd.readouterr().out

    def drafts(*options: str) -> bool:
        """Return whether the head was used. `depths` shows whether it drafted trees."""
        depths.clear()
        assert exit_code(monkeypatch, *arguments, *options) == 0
        assert capfd.readouterr().out == plain
        return bool(depths)

    assert drafts("--head", file)
    assert any(depths)
    asked = len(depths)
    assert drafts("--head", file, "--drafter", "head", "--tree", "chain")
    assert not any(depths)
    assert asked < len(depths)
    assert drafts("--head", file, "--drafter", "head", "--tree", "static")
    assert any(depths)
    assert not drafts()
    shipped[model] = Path(file)
    assert drafts()
    assert drafts("--controller", "cost-aware")
    assert not drafts("--drafter", "lookup")
    assert not drafts("--draft", "layers:0-2")
    shipped.clear()
    for given, reason in (
        (("--drafter", "head"), f"no head comes with {model}: name the folder of one with --head"),
        (("--drafter", "lookup", "--head", file), "--head is of no use with --drafter lookup"),
        (("--draft", "layers:0", "--head", file), "--draft is of no use with --drafter lookup+head"),
        (("--head", "./nowhere"), "there is no draft head './nowhere': name the folder of a head"),
    ):
        assert exit_code(monkeypatch, *arguments, *given) == 2
        assert reason in " ".join(capfd.readouterr().err.split())


def depths(options: dict[str, Any], target: LM, file: str, length: int) -> list[int]:
    """Return the steps by tree depth, for the options of an arm."""
    if "quantize" in options:
        target = target.quantized(options["quantize"])
    shape = {
        "static": StaticTree((2, 1)),
        "best-first": BestFirstTree(6, 0.001),
    }.get(options.get("shape", ""), Chain())
    drafter: Drafter = HeadDrafter(load_head(file, target), shape)
    if options["drafter"] == "lookup+head":
        drafter = Cascade(PromptLookup(min_ngram=options["min_ngram"]), drafter)
    result = generate(
        target,
        target.encode("Once upon a time"),
        drafter=drafter,
        controller=FixedK(options.get("k", 5)),
        max_new_tokens=length,
    )
    return result.depths


@pytest.mark.parametrize(
    "options",
    [
        {"k": 3},
        {"shape": "static", "branching": [2, 1], "quantize": "int8"},
        {"shape": "best-first", "nodes": 6, "threshold": 0.001},
        {"drafter": "lookup+head", "min_ngram": 3},
    ],
    ids=str,
)
def test_an_arm_drafts_with_a_head_and_so_do_its_lines(model: str, file: str, options: dict[str, Any]) -> None:
    """Guards against an arm whose options do not reach its head, and a code snippet of another configuration."""
    options = {"drafter": "head", "head": file, **options}
    pasted: dict[str, Any] = {}
    exec(code_snippet(speed_run(identity=("abacus", model, "", "float64"), arm=speed_arm(1.0, options)), "arm"), pasted)
    target = load(model, device="cpu", dtype="float64", backend="eager")
    made = make_arm("arm", options, target, None, "eager").run(target.encode("Once upon a time"), 100, ())
    result = pasted["result"]
    assert result.tokens == made.tokens[: len(result.tokens)]
    # The tokens are the target's for any shape, but the number of drafted tokens depends on the shape.
    assert 0 < result.drafted <= made.counts.drafted
    assert made.histograms.depth[1:] == depths(options, target, file, len(made.tokens))[1:]
    with pytest.raises(ModelFileError, match="holds no EAGLE-3 head"):
        make_arm("arm", {"drafter": "head"}, target, None, "eager")


def test_a_target_of_random_weights_drafts_with_a_head_of_such(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a preset that cannot be rehearsed, because nobody has trained a head for a model of random
    weights.
    """
    # With costs measured now, the cost-aware controller may find that drafting does not pay.
    free = Costs({1: 1e-3}, {Limit(1): DraftCost(1, 0.0)})
    monkeypatch.setattr(parts, "measure_costs", lambda *of: free)
    target = load("shape:tiny", device="cpu")
    for entry in ({}, {"head": file, "shape": "static"}, {"controller": "cost-aware"}):
        made = make_arm("arm", {"drafter": "head", **entry}, target, None, "eager")
        assert made.synthetic
        run = made.run(prompt(), 12, ())
        assert len(run.tokens) == 12
        assert run.counts.drafted > 0


def test_a_target_without_output_embedding_has_none_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an AttributeError for a head that shares the target's output embedding."""
    target = LM(build(ARCHITECTURES["llama"]), name="bare")
    monkeypatch.setattr(target.model, "get_output_embeddings", lambda: None)
    with pytest.raises(UnsupportedModelError, match="bare has no output embedding that a head could share"):
        output_rows(target, torch.tensor([3]))


def test_a_target_without_a_head_is_measured_without_its_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a preset that fails for targets without a trained head, and against an arm that is lost where the
    target has one.
    """
    entries = 'ar = {}\nours = { drafter = "lookup+head" }\nown = { drafter = "head", head = "own" }'
    preset = tmp_path / "heads.toml"
    preset.write_text(f'prompts = "prose:1"\nmax_new_tokens = 8\nrepeats = 1\n[arms]\n{entries}\n')
    monkeypatch.setattr(plan, "shipped_head", {"with": Path("with-head")}.get)

    def arms(target: str) -> list[str]:
        options = Options(root=tmp_path, preset=str(preset), target=target, device="cpu")
        return list(plan.resolve(options).preset.arms)

    assert arms("without") == ["ar", "own"]
    assert arms("with") == arms("shape:pythia-70m") == ["ar", "ours", "own"]


def test_a_head_that_drafts_worse_regresses(tmp_path: Path) -> None:
    """Guards against a head that became worse, by a flag lost in a conversion or by new training, and passes: outputs
    stay right, so only the gate sees it.
    """
    folder = write_head(lm("llama"), tmp_path, taught())
    arms = {"ar": {}, "head": {"drafter": "head", "head": str(folder), "k": 3}}

    def measured() -> RunFile:
        made = [make_arm(name, entry, lm("llama"), None, "eager") for name, entry in arms.items()]
        results = experiment(made, {"text/1": list(prompt())}, LENGTH, 1)
        identity = Identity("a-machine", "llama", "", "float64", "heads")
        return RunFile(Path("run"), Header(identity, LENGTH, results.outputs(), results.floor), results.records())

    old = measured()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_before_residual": True}))
    [judgement] = [found for found in judge(measured(), old) if (found.arm, found.gate) == ("head", "counters")]
    assert judgement.verdict is Verdict.REGRESSED
    assert "mean_acceptance_length" in judgement.reason
    assert "steps that accept at least " in judgement.reason
    [same] = [found for found in judge(old, old) if (found.arm, found.gate) == ("head", "counters")]
    assert same.verdict is Verdict.PASS
