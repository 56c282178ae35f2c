"""Blocks that meet a limit, and calls that are refused before they can go wrong."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from specdecode import (
    LM,
    BestFirstTree,
    Chain,
    DraftTree,
    FixedK,
    Generation,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    ReplayDrafter,
    Sampling,
    StaticTree,
    Step,
    generate,
)
from specdecode.controllers.base import Limit
from specdecode.core.sampling import Rng
from specdecode.drafters.base import Context, Drafter
from specdecode.drafters.tree_shapes import TreeShape
from tests.helpers.drafts import part
from tests.helpers.models import ARCHITECTURES, VOCABULARY, build, continuation, greedy, lm, logits, prompt

LENGTH = 24
# For what already shows in the first steps, such as a prompt that is read wrongly.
SHORT = 12


@dataclass
class Scripted:
    """A drafter of a known text that is right for as many tokens as the script says, step by step."""

    text: Sequence[int]
    right: list[int]
    forwards: int = 0
    limits: list[Limit] = field(default_factory=list)
    layers: tuple[int, ...] = ()

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        right = self.right[len(self.limits) % len(self.right)]
        self.limits.append(limit)
        place = len(context.tokens)
        known = self.text[place : place + limit.depth]
        return DraftTree.chain(
            torch.tensor([token if i < right else (token + 1) % VOCABULARY for i, token in enumerate(known)])
        )


def known() -> list[int]:
    return greedy("llama", LENGTH)


def scripted(*right: int) -> Scripted:
    return Scripted([*prompt(), *known()], list(right))


def decode(drafter: Drafter = NoDraft(), k: int = 5, **options: object) -> Generation:
    options = {"max_new_tokens": LENGTH} | options
    return generate(lm("llama"), prompt(), drafter=drafter, controller=FixedK(k), **options)


# The end of a text.


@pytest.mark.parametrize("place", range(12))
@pytest.mark.parametrize("right", [0, 2, 5])
def test_a_stop_token_ends_the_text_wherever_it_falls(place: int, right: int) -> None:
    """Guards against tokens after a stop token that was accepted in the middle of a block, or that is its bonus."""
    stop = known()[place]
    first = known().index(stop)
    absent = next(token for token in range(VOCABULARY) if token not in known())
    result = decode(scripted(right), stop_token_ids=[absent, stop])
    assert result.tokens == known()[: first + 1]
    assert result.finish_reason == "stop"
    assert sum(step.emitted for step in result.steps) == first + 1
    assert all(step.accepted <= step.emitted <= step.accepted + 1 for step in result.steps)


def test_a_stop_token_of_the_prompt_stops_nothing() -> None:
    """Guards against a stop token in the prompt that ends the output."""
    absent = next(token for token in prompt() if token not in known())
    result = decode(scripted(2), stop_token_ids=[absent])
    assert result.tokens == known()
    assert result.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 7, 11, 12])
@pytest.mark.parametrize("right", [0, 3, 5])
def test_the_length_limit_holds_inside_a_block(length: int, right: int) -> None:
    """Guards against tokens beyond the length limit, and against drafts of tokens beyond it."""
    drafter = scripted(right)
    result = decode(drafter, max_new_tokens=length)
    assert result.tokens == known()[:length]
    assert result.finish_reason == "length"
    assert sum(step.emitted for step in result.steps) == length
    left = length
    for step in result.steps:
        assert step.depth == min(5, left - 1)
        left -= step.emitted


def test_the_last_token_alone_is_not_drafted() -> None:
    """Guards against a draft forward whose proposals cannot be used."""
    drafter = ModelDrafter(lm("llama").subset([0]))
    result = decode(drafter, max_new_tokens=1)
    assert result.tokens == known()[:1]
    assert drafter.forwards == result.draft_forwards == 0


def model_drafters(draft: LM) -> dict[str, ModelDrafter]:
    return {
        "chain": ModelDrafter(draft, Chain()),
        "static": ModelDrafter(draft, StaticTree((2, 2))),
        "best-first": ModelDrafter(draft, BestFirstTree(8, 0.0)),
    }


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_prompt_may_be_as_short_as_one_token(length: int) -> None:
    """Guards against an error in an empty prefill, or in a lookup without text."""
    text = prompt()[:length]
    expected = greedy("llama", SHORT, text)
    for drafter in (NoDraft(), PromptLookup(), *model_drafters(part(lm("llama"), 0, 1, 3)).values()):
        assert generate(lm("llama"), text, drafter=drafter, max_new_tokens=SHORT).tokens == expected


def test_a_prompt_may_be_a_tensor() -> None:
    """Guards against token ids that are tensors where ints are promised."""
    result = generate(lm("llama"), torch.tensor(prompt()), max_new_tokens=LENGTH)
    assert result.tokens == known()
    assert {type(token) for token in result.tokens} == {int}


def test_one_token_may_be_drafted_at_a_time() -> None:
    """Guards against errors in a block whose accepted token is also its last."""
    for drafter in (scripted(0, 1), PromptLookup(), *model_drafters(lm("llama").subset([0, 1, 3])).values()):
        result = decode(drafter, k=1)
        assert result.tokens == known()
        assert max(step.depth for step in result.steps) == 1


def test_a_drafter_may_have_nothing_to_propose() -> None:
    """Guards against errors in a step without a draft among others: its root alone goes through the target."""

    @dataclass
    class Sometimes(Scripted):
        def propose(self, context: Context, limit: Limit) -> DraftTree:
            tree = Scripted.propose(self, context, limit)
            return DraftTree.empty() if len(self.limits) % 2 else tree

    result = decode(Sometimes([*prompt(), *known()], [2, 2, 0, 5]))
    assert result.tokens == known()
    assert {step.drafted for step in result.steps} >= {0, 5}


@pytest.mark.parametrize("length", [2, 7, LENGTH])
def test_a_drafter_that_ignores_its_limit_is_cut(length: int) -> None:
    """Guards against a user's drafter that takes a step past the length limit or a policy's boundary."""

    @dataclass
    class Boundless(Scripted):
        def propose(self, context: Context, limit: Limit) -> DraftTree:
            return Scripted.propose(self, context, Limit(9))

    told: list[int] = []

    def listen(tokens: list[int]) -> None:
        told.extend(tokens)
        assert len(told) <= length

    result = decode(Boundless([*prompt(), *known()], [9]), max_new_tokens=length, on_step=listen)
    assert result.tokens == told == known()[:length]
    left = length
    for step in result.steps:
        assert step.depth == step.drafted == step.accepted == min(5, left - 1)
        left -= step.emitted


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 14, 15])
def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Guards against a piece of a prompt lost or read twice at a seam, in the target and in the draft."""
    monkeypatch.setattr("specdecode.models.forwards.PREFILL_CHUNK", chunk)
    for drafter in (NoDraft(), *model_drafters(part(lm("llama"), 0, 1, 3)).values()):
        result = decode(drafter, max_new_tokens=SHORT)
        assert result.tokens == known()[:SHORT]
        # The last piece is read in the first step.
        assert result.prefill_forwards == math.ceil(len(prompt()) / chunk) - 1
        assert result.target_forwards == result.prefill_forwards + len(result.steps)


# Drafts of another size than the target.


@functools.cache
def draft(**values: int) -> LM:
    return LM(build(ARCHITECTURES["llama"] | {"num_hidden_layers": 1} | values, seed=7))


@pytest.mark.parametrize("shape", [Chain(), StaticTree((2, 2)), BestFirstTree(8, 0.0)], ids=str)
def test_a_draft_of_a_shorter_context_stops_drafting(shape: object) -> None:
    """Guards against positions that the draft was not trained on, and a crash where its table of positions ends."""
    short = LM(build(ARCHITECTURES["gpt-2"] | {"n_positions": 24}), name="short")
    result = decode(ModelDrafter(short, shape))
    assert result.tokens == known()
    drafted = [step.drafted for step in result.steps]
    assert drafted[1] > 0
    assert drafted[-3:] == [0, 0, 0]


@pytest.mark.parametrize("width", [VOCABULARY - 40, VOCABULARY - 1, VOCABULARY + 7])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1)], ids=["greedy", "sampling"])
def test_a_draft_s_vocabulary_may_be_padded_otherwise(width: int, sampling: Sampling) -> None:
    """Guards against proposals without a token of the target, tokens without one of the draft, and subtracting
    distributions of two widths.
    """
    model = draft(vocab_size=width)
    for drafter in model_drafters(model).values():
        context = Context(list(prompt()), VOCABULARY, sampling, sampling.rng())
        tree = drafter.propose(context, Limit(3))
        if max(prompt()) < width:
            assert len(tree) > 0
            assert tree.tokens.max() < min(width, VOCABULARY)
        else:
            assert len(tree) == 0
        if tree.probs is not None and len(tree):
            both = min(width, VOCABULARY)
            expected = sampling.probs(logits(model.model, prompt())[-1, :both])
            assert tree.probs[0, :both].tolist() == pytest.approx(expected.tolist())
            assert not tree.probs[:, both:].any()
            assert tree.probs.shape == (len(tree), VOCABULARY)
        result = decode(drafter, sampling=sampling, max_new_tokens=SHORT)
        assert len(result.tokens) == SHORT
        assert result.tokens == known()[:SHORT] or not sampling.greedy


def test_a_drafter_may_serve_one_prompt_after_another() -> None:
    """Guards against state of the last prompt, where the next one begins alike or is part of it."""

    def drafters() -> list[Drafter]:
        return [PromptLookup(), *model_drafters(part(lm("llama"), 0, 1, 3)).values()]

    for place, drafter in enumerate(drafters()):
        for length in (14, 9):
            text = prompt()[:length]
            result, fresh = (
                generate(lm("llama"), text, drafter=each, max_new_tokens=SHORT) for each in (drafter, drafters()[place])
            )
            assert result.tokens == greedy("llama", SHORT, text)
            assert [(step.drafted, step.accepted) for step in result.steps] == [
                (step.drafted, step.accepted) for step in fresh.steps
            ]


# Counters and measures.


@pytest.mark.parametrize("right", [(0,), (5,), (0, 1, 2, 3, 4, 5), (3, 0)], ids=str)
def test_measures_are_what_their_definitions_say(right: tuple[int, ...]) -> None:
    """Guards against the bonus token counted as accepted, which once gave an acceptance of 105 %."""
    drafter = scripted(*right)
    result = decode(drafter)
    assert result.tokens == known()
    accepted = [min(right[i % len(right)], step.depth) for i, step in enumerate(result.steps)]
    assert [step.accepted for step in result.steps] == accepted
    assert [step.emitted for step in result.steps] == [n + 1 for n in accepted]
    assert [step.drafted for step in result.steps] == [step.depth for step in result.steps]
    assert result.acceptance_rate == sum(accepted) / sum(step.drafted for step in result.steps) <= 1.0
    assert result.mean_acceptance_length == LENGTH / len(result.steps) <= 6
    assert result.accepted_lengths == [accepted.count(n) for n in range(max(accepted) + 1)]
    for depth, rate in enumerate(result.acceptance_by_position, start=1):
        tried = [n for n, step in zip(accepted, result.steps, strict=True) if step.depth >= depth]
        assert rate == sum(n >= depth for n in tried) / len(tried)
    assert result.prompt_tokens == len(prompt())
    assert result.target_forwards == len(result.steps)


def test_times_add_up() -> None:
    """Guards against a rate whose time leaves out a part of the work, or counts the first token twice."""
    steps = [Step(5, 5, 7, 2, 3, 1, 0.1, 0.2, 0.4), Step(4, 2, 5, 2, 3, 2, 0.1, 0.2, 0.4)]
    result = Generation(tokens=[1, 2, 3, 4, 5, 6], steps=steps, prefill_forwards=2, prefill_s=1.0, decode_s=2.0)
    assert (result.ttft_s, result.total_s, result.tpot_s) == (1.0, 3.0, 2.0 / 5)
    assert result.throughput == 6 / 3.0
    assert (result.target_forwards, result.draft_forwards, result.drafted, result.accepted) == (4, 3, 9, 4)
    decoded = decode(scripted(2))
    parts = sum(step.draft_s + step.verify_s for step in decoded.steps)
    assert 0.0 < parts <= sum(step.total_s for step in decoded.steps) <= decoded.total_s


def test_measures_of_nothing_are_no_numbers() -> None:
    """Guards against a division by zero, and against a zero that looks like a measurement."""
    assert math.isnan(decode().acceptance_rate)
    assert decode().mean_acceptance_length == 1.0
    assert math.isnan(decode(max_new_tokens=1).tpot_s)
    assert math.isnan(Generation().mean_acceptance_length)
    assert decode().acceptance_by_position == []


@dataclass
class Watched:
    """A forward hook that records how many tokens each forward of a model reads."""

    rows: list[int] = field(default_factory=list)

    def __call__(self, module: object, args: object, kwargs: dict[str, torch.Tensor], output: object) -> None:
        self.rows.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("name", ["chain", "static", "best-first"])
def test_the_first_token_does_not_wait_for_the_draft(name: str) -> None:
    """Guards against a time to the first token that includes the draft's reading of the prompt."""
    drafter = model_drafters(draft())[name]
    forwards: list[int] = []
    decode(drafter, on_step=lambda _: forwards.append(drafter.forwards))
    assert forwards[0] == 0 < forwards[1]


@pytest.mark.parametrize("name", ["chain", "static", "best-first"])
@pytest.mark.parametrize("of", ["another model", "the target itself"])
def test_a_draft_reads_every_token_once(name: str, of: str) -> None:
    """Guards against a draft that prefills again at every step: the tokens are the same, and the speed is lost."""
    model = build(ARCHITECTURES["llama"], seed=7 if of == "another model" else 2)
    drafter = model_drafters(LM(model))[name]
    watched = Watched()
    model.register_forward_hook(watched, with_kwargs=True)
    result = decode(drafter, k=4)
    assert result.tokens == known()
    assert len(watched.rows) == drafter.forwards == result.draft_forwards
    # The first forward of each step reads text, and the later ones read nodes. At most two tokens of the text are new
    # to the draft: a node of the deepest level and the target's own token.
    ends = list(itertools.accumulate(step.draft_forwards for step in result.steps if step.draft_forwards))
    read = [watched.rows[start] for start in [0, *ends[:-1]]]
    assert read[0] == len(prompt()) + 1  # after the first token
    assert max(read[1:]) <= 2


@pytest.mark.parametrize(
    ("shape", "limit"),
    [(Chain(), Limit(4)), (Chain(), Limit(5, 3)), (StaticTree((2, 2)), Limit(5)), (StaticTree((2, 2, 2), 6), Limit(5))],
    ids=str,
)
def test_a_tree_costs_a_forward_for_each_level(shape: TreeShape, limit: Limit) -> None:
    """Guards against a useless draft forward over the deepest level."""
    drafter = ModelDrafter(lm("llama").subset([0]), shape)
    tree = drafter.propose(Context(list(prompt()), VOCABULARY, Sampling(), Rng(0)), limit)
    assert drafter.forwards == tree.depth


def test_a_best_first_tree_ends_where_nothing_better_follows() -> None:
    """Guards against draft forwards for levels from which no path is proposed."""
    drafter = ModelDrafter(lm("llama").subset([0]), BestFirstTree(4, threshold=0.0))
    tree = drafter.propose(Context(list(prompt()), VOCABULARY, Sampling(), Rng(0)), Limit(8))
    assert drafter.forwards <= tree.depth + 1 < 8


def test_steps_are_reported_as_they_are_committed() -> None:
    """Guards against a stream that repeats, drops or reorders tokens, or continues after the stop."""
    steps: list[list[int]] = []
    result = decode(scripted(0, 5, 2), on_step=steps.append, stop_token_ids=[known()[15]])
    assert [token for step in steps for token in step] == result.tokens
    assert [len(step) for step in steps] == [step.emitted for step in result.steps]


def test_a_controller_observes_every_step() -> None:
    """Guards against a controller that never sees a step, and a limit that is not passed on to the drafter."""

    @dataclass
    class Growing:
        seen: list[Step] = field(default_factory=list)

        def limit(self) -> Limit:
            return Limit(1 + len(self.seen), nodes=2 + len(self.seen))

        def observe(self, step: Step) -> None:
            self.seen.append(step)

    controller, drafter = Growing(), scripted(1)
    result = generate(lm("llama"), prompt(), drafter=drafter, controller=controller, max_new_tokens=LENGTH)
    assert result.tokens == known()
    assert controller.seen == result.steps
    assert [limit.nodes for limit in drafter.limits] == [2 + i for i in range(len(drafter.limits))]
    assert [limit.depth for limit in drafter.limits[:4]] == [1, 2, 3, 4]


# Refusals.


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([3, VOCABULARY], {}, r"token 97 of the prompt is outside the vocabulary \(0 to 96\)"),
        ([-1], {}, "token -1 of the prompt"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([3] * 512, {}, "the prompt has 512 tokens, but the context of llama holds 512: shorten it"),
        ([3] * 600, {"max_new_tokens": 1}, "the prompt has 600 tokens"),
        ([3] * 500, {"max_new_tokens": 13}, r"500 prompt tokens and 13 new ones exceed .* ask for at most 12"),
    ],
)
def test_a_call_that_cannot_be_met_is_refused(text: list[int], options: dict[str, int], sentence: str) -> None:
    """Guards against an index error from inside a model, and a text that silently runs past the context."""
    with pytest.raises(ValueError, match=sentence):
        generate(lm("llama"), text, **options)


def test_the_whole_context_may_be_used() -> None:
    """Guards against a context limit that is one token too strict, or one too generous for the table of positions."""
    model = build(ARCHITECTURES["gpt-2"] | {"n_positions": 20})
    expected = continuation(model, prompt(), 6)
    assert generate(LM(model), prompt(), drafter=PromptLookup(), max_new_tokens=6).tokens == expected


def test_a_rotation_that_changes_with_the_length_bounds_the_context() -> None:
    """Guards against cached keys rotated by other factors than later keys (LongRoPE)."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0} | factors
    model = build(ARCHITECTURES["phi3"] | {"original_max_position_embeddings": 24, "rope_parameters": rope})
    target = LM(model, name="long")
    expected = continuation(model, prompt(), 10)
    assert generate(target, prompt(), drafter=PromptLookup(), max_new_tokens=10).tokens == expected
    with pytest.raises(ValueError, match="exceed the context of long, 24 tokens: ask for at most 10"):
        generate(target, prompt(), max_new_tokens=11)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FixedK(0), "K is 0: a draft needs at least 1 token"),
        (lambda: FixedK(3, nodes=0), "nodes is 0"),
        (lambda: StaticTree(()), r"branching is \(\)"),
        (lambda: StaticTree((2, 0)), r"branching is \(2, 0\)"),
        (lambda: StaticTree((2,), nodes=0), "nodes is 0"),
        (lambda: BestFirstTree(nodes=0), "nodes is 0"),
        (lambda: BestFirstTree(threshold=1.0), "threshold is 1.0"),
        (lambda: BestFirstTree(threshold=-0.1), "threshold is -0.1"),
        (lambda: PromptLookup(max_ngram=0), "max_ngram is 0"),
        (lambda: PromptLookup(branches=0), "branches is 0"),
        (lambda: PromptLookup(min_ngram=0), "min_ngram is 0"),
        (lambda: PromptLookup(2, min_ngram=3), "min_ngram is 3: it must be from 1 to max_ngram, 2"),
        (lambda: ReplayDrafter(NoDraft(), [1], acceptance=2), "acceptance is 2"),
        (lambda: ReplayDrafter(NoDraft(), [1], acceptance=-0.5), "acceptance is -0.5"),
        (lambda: lm("llama").subset([]), r"layers is \[\]: it must be ascending indices from 0 to 3"),
        (lambda: lm("llama").subset([1, 0]), r"layers is \[1, 0\]"),
        (lambda: lm("llama").subset([1, 1]), r"layers is \[1, 1\]"),
        (lambda: lm("llama").subset([0, 4]), r"layers is \[0, 4\]"),
        (lambda: lm("llama").subset([-1, 2]), r"layers is \[-1, 2\]"),
    ],
)
def test_a_part_out_of_its_range_is_named(make: object, sentence: str) -> None:
    """Guards against a wrong setting that fails far from where it was given."""
    with pytest.raises(ValueError, match=sentence):
        make()


def test_the_model_s_own_stop_tokens_are_offered() -> None:
    """Guards against one stop token where a model declares several, and against stopping at them unasked."""
    model = build(ARCHITECTURES["llama"])
    for declared, expected in [(None, ()), (5, (5,)), ([5, 7], (5, 7))]:
        model.generation_config.eos_token_id = declared
        assert LM(model).stop_token_ids == expected
