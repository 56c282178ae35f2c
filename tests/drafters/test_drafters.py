"""The proposals of drafters, compared with a draft's outputs without its cache.

A wrong proposal costs speed but no token, so decoding cannot show it.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    generate,
)
from specdecode.controllers.base import MAX_DRAFT_NODES, Limit
from specdecode.core.sampling import Rng
from specdecode.core.slots import Slots
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.tree_shapes import TreeShape
from specdecode.heads.bound import BoundHead, untrained
from specdecode.models.recording import recorded_hidden_states
from tests.helpers.discovery import DRAFTERS, examples
from tests.helpers.drafts import part
from tests.helpers.models import ARCHITECTURES, build, logits, small
from tests.helpers.trees import paths

VOCABULARY = 11
TEXT = [3, 8, 1, 3, 8, 9, 4, 1, 3, 8]
SAMPLING = Sampling(0.9, top_k=4)

contexts = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@functools.cache
def target() -> LM:
    return small(seed=3, vocab_size=VOCABULARY, num_hidden_layers=2)


@functools.cache
def examples_of_target() -> dict[str, Drafter]:
    """Return example drafters, to be copied and not used."""
    return {name: drafter for file in DRAFTERS for name, drafter in examples(file, target()).items()}


def unused(name: str) -> Drafter:
    """Return a copy of an example drafter. It shares the models, which keep nothing of a text."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (LM, BoundHead, torch.nn.Module):
            patch.setattr(kind, "__deepcopy__", lambda self, memo: self, raising=False)
        return copy.deepcopy(examples_of_target()[name])


def context(tokens: list[int], sampling: Sampling = Sampling(), seed: int = 0, layers: tuple[int, ...] = ()) -> Context:
    """Return a context with the hidden states of the target's layers, by a forward without a cache."""
    states = None
    if layers:
        with recorded_hidden_states(target().model, layers) as outputs, torch.inference_mode():
            target().model(torch.tensor([tokens], device=target().device), use_cache=False)
        states = torch.cat(outputs, -1)[0, :-1]
    return Context(tokens, VOCABULARY, sampling, Rng(seed), states)


def distribution_after(text: list[int], sampling: Sampling) -> torch.Tensor:
    return sampling.probs(logits(target().model, text)[-1])


def read_twice(drafter: Drafter, sampling: Sampling, limit: Limit) -> DraftTree:
    """Return the proposal of a drafter that has decoded half of the text, and so has a filled cache."""
    drafter.propose(context(TEXT[:5], sampling), limit)
    drafter.propose(context(TEXT[:8], sampling), limit)
    return drafter.propose(context(TEXT, sampling), limit)


def test_a_greedy_chain_is_the_draft_s_own_continuation() -> None:
    """Guards against a draft that reads a token at the wrong position, or not at all."""
    tree = read_twice(ModelDrafter(target()), Sampling(), Limit(5))
    text = list(TEXT)
    for _ in range(5):
        text.append(int(distribution_after(text, Sampling()).argmax()))
    assert paths(tree)[-1] == text[len(TEXT) :]
    assert tree.probs is None


def test_a_greedy_static_tree_holds_the_most_probable_tokens() -> None:
    """Guards against nodes of a draft tree that see their siblings or cousins, and rows swapped between parents."""
    tree = read_twice(ModelDrafter(target(), StaticTree((3, 2, 2), nodes=64)), Sampling(), Limit(5))
    expected: list[list[int]] = []
    level: list[list[int]] = [[]]
    for count in (3, 2, 2):
        level = [
            [*path, token]
            for path in level
            for token in distribution_after(TEXT + path, Sampling()).topk(count).indices.tolist()
        ]
        expected += level
    assert paths(tree) == expected


@pytest.mark.parametrize("shape", [Chain(), StaticTree((3, 2, 1)), StaticTree((6, 1))], ids=str)
def test_a_sampled_tree_carries_the_distributions_that_it_was_drawn_from(shape: TreeShape) -> None:
    """Guards against the classic silent bug: passing on the distribution before top-k, of another node, or of the first
    sibling for all.
    """
    tree = read_twice(ModelDrafter(target(), shape), SAMPLING, Limit(3))
    assert tree.probs is not None
    assert tree.depth > 1
    for path, distribution, parent, node in zip(
        paths(tree), tree.probs, tree.parents.tolist(), range(len(tree)), strict=True
    ):
        expected = distribution_after(TEXT + path[:-1], SAMPLING)
        earlier = [int(tree.tokens[i]) for i in range(node) if tree.parents[i] == parent]
        assert path[-1] not in earlier
        expected[earlier] = 0.0
        torch.testing.assert_close(distribution, expected / expected.sum())
        assert distribution[path[-1]] > 0


def test_no_more_siblings_are_drawn_than_there_are_tokens() -> None:
    """Guards against proposals drawn from a distribution without mass."""
    tree = ModelDrafter(target(), StaticTree((VOCABULARY,))).propose(context(TEXT, SAMPLING), Limit(3))
    assert len(tree) == 4
    assert sorted(tree.tokens.tolist()) == sorted(distribution_after(TEXT, SAMPLING).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("nodes", "threshold", "limit"),
    [(12, 0.01, Limit(4)), (3, 0.0, Limit(3)), (40, 0.05, Limit(2)), (40, 0.0, Limit(3, 7)), (9, 0.5, Limit(4))],
)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING], ids=["greedy", "sampling"])
def test_a_best_first_tree_holds_the_most_probable_paths(
    nodes: int, threshold: float, limit: Limit, sampling: Sampling
) -> None:
    """Guards against leaving out a more probable path than a proposed one, and proposing one below the threshold."""
    probability: dict[tuple[int, ...], float] = {}
    level: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(limit.depth):
        level = {
            (*path, token): p * q
            for path, p in level.items()
            for token, q in enumerate(distribution_after([*TEXT, *path], sampling).tolist())
            if p * q >= threshold and p * q > 0
        }
        probability |= level
    best = sorted(probability, key=lambda path: -probability[path])[: min(nodes, limit.nodes)]
    tree = read_twice(ModelDrafter(target(), BestFirstTree(nodes, threshold)), sampling, limit)
    assert sorted(map(tuple, paths(tree))) == sorted(best)
    assert tree.probs is None


@given(tokens=contexts, sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), depth=st.integers(1, 6))
def test_a_lookup_continues_the_most_recent_longest_match(
    tokens: list[int], sizes: tuple[int, int], depth: int
) -> None:
    """Guards against a match of the text's end with itself, an older or a shorter match, one below the minimum, and a
    copy that is cut short.
    """
    min_ngram, max_ngram = sorted(sizes)
    expected: list[int] = []
    for size in range(min(max_ngram, len(tokens) - 1), min_ngram - 1, -1):
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if ends:
            expected = (tokens[ends[-1] :] * depth)[:depth]
            break
    tree = PromptLookup(max_ngram, min_ngram=min_ngram).propose(context(tokens), Limit(depth))
    assert tree.tokens.tolist() == expected
    assert tree.depth == len(expected)


@given(tokens=contexts, branches=st.integers(1, 4), depth=st.integers(1, 4))
def test_several_lookups_share_their_first_nodes(tokens: list[int], branches: int, depth: int) -> None:
    """Guards against siblings that propose the same token, and repeated matches that count as further branches."""
    expected: list[list[int]] = []
    for size in range(min(2, len(tokens) - 1), 0, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            copied = (tokens[end:] * depth)[:depth]
            if tokens[end - size : end] == tokens[-size:] and copied not in expected:
                expected.append(copied)
    tree = PromptLookup(2, branches).propose(context(tokens), Limit(depth))
    assert [path for path in paths(tree) if len(path) == depth] == expected[:branches]
    assert len({tuple(path) for path in paths(tree)}) == len(tree)


@given(tokens=contexts, depth=st.integers(1, 4))
@settings(max_examples=20)
def test_a_cascade_asks_the_next_drafter_where_the_one_before_has_nothing(tokens: list[int], depth: int) -> None:
    """Guards against running a draft model where the lookup has a proposal, and steps without a draft where one was
    possible.
    """
    lookup, model = PromptLookup(min_ngram=2), ModelDrafter(part(target(), 0))
    cascade = Cascade(PromptLookup(min_ngram=2), model)
    proposed = cascade.propose(context(tokens), Limit(depth))
    found = lookup.propose(context(tokens), Limit(depth))
    expected = found if len(found) else ModelDrafter(part(target(), 0)).propose(context(tokens), Limit(depth))
    assert proposed.tokens.tolist() == expected.tokens.tolist()
    assert proposed.parents.tolist() == expected.parents.tolist()
    assert cascade.forwards == model.forwards
    assert (model.forwards == 0) == (len(found) > 0)


def test_a_cascade_reads_what_its_drafters_read() -> None:
    """Guards against a head that gets no hidden states, or those of other layers than it was trained on."""
    first, second = (BoundHead(untrained(target(), seed), target()) for seed in (0, 1))
    other = copy.copy(second)
    other.layers = (0,)
    assert Cascade(PromptLookup(), HeadDrafter(first), HeadDrafter(second)).layers == first.layers
    assert Cascade(PromptLookup(), NoDraft()).layers == ()
    with pytest.raises(ValueError, match="different layers of the target"):
        Cascade(HeadDrafter(first), HeadDrafter(other))
    with pytest.raises(ValueError, match="a cascade of 1 drafters"):
        Cascade(NoDraft())


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_a_replay_accepts_as_often_as_it_should(acceptance: float) -> None:
    """Guards against synthetic measurements at another acceptance than their label says."""
    known = generate(target(), TEXT, max_new_tokens=120).tokens
    replay = ReplayDrafter(ModelDrafter(part(target(), 0)), TEXT + known, acceptance)
    result = generate(target(), TEXT, drafter=replay, controller=FixedK(1), max_new_tokens=120)
    assert result.tokens == known
    assert result.acceptance_rate == pytest.approx(acceptance, abs=0.0 if acceptance in (0.0, 1.0) else 0.12)
    assert result.draft_forwards > 0


def test_a_replay_finds_its_text_again() -> None:
    """Guards against an acceptance that collapses once rounding has made the target choose another token."""
    known = [5, 8, 1, 3, 9, 4, 7, 2, 6, 8, 1, 3, 0, 10]
    replay = ReplayDrafter(ModelDrafter(target()), known, acceptance=1.0)

    def proposed(tokens: list[int]) -> list[int]:
        return replay.propose(context(tokens), Limit(3)).tokens.tolist()

    assert proposed(known[:4]) == [9, 4, 7]
    wrong = [*known[:4], 2]
    assert proposed(wrong) == [3, 3, 3]
    assert proposed([*wrong, 9]) == [10, 10, 10]
    assert replay.lost == 2
    # After one token too many, after one too few, and where the same tokens stand twice.
    assert proposed([*wrong, 9, 4, 7]) == [2, 6, 8]
    assert proposed([*known[:3], 9, 4, 7]) == [2, 6, 8]
    assert proposed([*known[:9], 4, 8, 1, 3])[:2] == [0, 10]
    assert replay.lost == 2
    empty = ReplayDrafter(NoDraft(), known, acceptance=1.0)
    empty.propose(context(wrong), Limit(3))
    assert empty.lost == 0


@pytest.mark.parametrize("shape", [Chain(), StaticTree((2, 1, 1)), BestFirstTree(nodes=6, threshold=0.0)])
def test_accepted_replayed_tokens_are_not_read_again(shape: TreeShape) -> None:
    """Guards against a draft that costs too much at a set acceptance, since it reads its accepted tokens twice."""
    known = generate(target(), TEXT, max_new_tokens=20).tokens
    replay = ReplayDrafter(ModelDrafter(part(target(), 0), shape), TEXT + known, acceptance=1.0)
    length = len(TEXT) + 2
    for _ in range(4):
        tree = replay.propose(context([*TEXT, *known][:length]), Limit(3))
        length += tree.depth + 1
        # The last level is never read, and neither is the target's own token.
        assert len(replay.inner._synchronise([*TEXT, *known][:length])) <= 2
        length -= 1


@pytest.mark.parametrize("name", ["chain", "streaming", "head"])
def test_the_slots_of_a_draft_have_room_for_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against slots that grow during a text, since their CUDA graphs are captured anew, and against slots for a
    whole text where only some of it stays.
    """
    drafter = {
        "chain": lambda: ModelDrafter(part(target(), 0)),
        "streaming": lambda: ModelDrafter(target(), policy=SinkWindow(32, sinks=2)),
        "head": lambda: HeadDrafter(BoundHead(untrained(target()), target())),
    }[name]()
    grown, grow = [], Slots.grow
    monkeypatch.setattr(Slots, "grow", lambda self, capacity: grown.append(capacity) or grow(self, capacity))
    # A longer text that begins otherwise gets slots of its own size.
    for text, length in ((TEXT, 280), (TEXT[::-1], 400)):
        generate(target(), text, drafter=drafter, controller=FixedK(4), max_new_tokens=length)
        assert drafter._slots.length > 0
        assert drafter._slots.capacity <= (32 if name == "streaming" else len(text) + length) + MAX_DRAFT_NODES
    assert grown == []


@pytest.mark.parametrize("shape", [BestFirstTree(), Chain()])
def test_a_draft_of_no_nodes_is_empty(shape: TreeShape) -> None:
    """Guards against a controller that asks for no nodes, and gets an index error; and against a text that the drafter
    takes for read.
    """
    drafter = ModelDrafter(target(), shape)
    for length in (5, 6):
        assert len(drafter.propose(context(TEXT[:length]), Limit(3, nodes=0))) == 0
    found, expected = (one.propose(context(TEXT), Limit(3)) for one in (drafter, ModelDrafter(target(), shape)))
    assert found.host_tokens == expected.host_tokens


@pytest.mark.parametrize("shape", [BestFirstTree(), Chain()])
def test_a_draft_whose_cache_is_full_proposes_nothing(shape: TreeShape) -> None:
    """Guards against an error at the length at which a policy evicts, if the cache is then as long as the context."""
    draft = LM(build(ARCHITECTURES["llama"] | {"max_position_embeddings": 16}))
    drafter = ModelDrafter(draft, shape, policy=SinkWindow(16, sinks=2, interval=4))
    text = [*TEXT, *TEXT]
    depths = [drafter.propose(context(text[:length]), Limit(3)).depth for length in range(13, 20)]
    assert depths == [3, 2, 1, 0, 3, 2, 1]


def test_a_replay_s_choice_depends_on_the_position_alone() -> None:
    """Guards against runs of different shapes that are not comparable because their luck differs."""
    known = list(range(VOCABULARY)) * 6
    right: dict[int, bool] = {}
    for shape, depth in [(Chain(), 1), (Chain(), 4), (StaticTree((2, 2)), 2)]:
        replay = ReplayDrafter(ModelDrafter(target(), shape), known, 0.5, seed=1)
        for length in range(1, 40):
            tree = replay.propose(context(known[:length]), Limit(depth))
            hit = known[length] in [path[0] for path in paths(tree)]
            assert right.setdefault(length, hit) == hit
    assert 10 < sum(right.values()) < 30


@pytest.mark.parametrize("name", examples_of_target())
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING], ids=["greedy", "sampling"])
@given(data=st.data())
@settings(max_examples=8)
def test_a_used_drafter_proposes_what_a_fresh_one_would(name: str, sampling: Sampling, data: st.DataObject) -> None:
    """Guards against state that outlives its text: a stale cache slot, a missing rollback, an index of another prompt.

    The text follows the proposal, departs from it, starts anew, or is cut. It changes in place, as in `generate`, so
    that the test also finds a drafter that keeps a reference to the list.
    """
    token = st.integers(0, VOCABULARY - 1)
    fresh = examples_of_target()[name]
    used, layers = unused(name), fresh.layers
    tokens = data.draw(st.lists(token, min_size=1, max_size=8))
    for seed in range(5):
        limit = Limit(data.draw(st.integers(1, 4)), data.draw(st.sampled_from([2, 5, 64])))
        before = list(tokens)
        tree = used.propose(context(tokens, sampling, seed, layers), limit)
        assert tokens == before
        expected = unused(name).propose(context(before, sampling, seed, layers), limit)
        assert paths(tree) == paths(expected)
        assert (tree.probs is None) == (expected.probs is None)
        if tree.probs is not None:
            torch.testing.assert_close(tree.probs, expected.probs)
        assert len(tree) <= limit.nodes
        assert tree.depth <= limit.depth
        change = data.draw(st.sampled_from(["accept", "accept", "accept", "go elsewhere", "cut", "start anew"]))
        if change == "accept":
            tokens += [*data.draw(st.sampled_from([[], *paths(tree)])), data.draw(token)]
        elif change == "go elsewhere":
            tokens += data.draw(st.lists(token, min_size=1, max_size=3))
        elif change == "cut":
            del tokens[data.draw(st.integers(1, len(tokens))) :]
        else:
            tokens[:] = data.draw(st.lists(token, min_size=1, max_size=8))


def test_nothing_is_proposed_by_no_draft() -> None:
    """Guards against a baseline that speculates."""
    assert len(NoDraft().propose(context(TEXT), Limit(5))) == 0
    assert NoDraft().forwards == 0
