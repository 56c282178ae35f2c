"""Several prompts in one forward: each gets the same output as alone, down to the steps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdecode import (
    LM,
    AdaptiveK,
    DraftTree,
    FixedK,
    Generation,
    KeepAll,
    ModelDrafter,
    PromptLookup,
    ReplayDrafter,
    Sampling,
    SinkWindow,
    StaticTree,
    generate,
    generate_batch,
)
from specdecode.core.slots import SlotBatch, Slots
from specdecode.drafters.base import Drafter
from tests.helpers.discovery import DRAFTERS, POLICIES
from tests.helpers.drafts import example_in_turn, part
from tests.helpers.enumeration import BranchRng, distribution_of
from tests.helpers.joint_distribution import PROMPT, distance, enumerated_model, target_distribution
from tests.helpers.models import VOCABULARY, build, lm, prompt, small

NAMES = ("llama", "gpt-neox", "gpt-2", "opt", "qwen2-window", "gemma3-window")


def texts(lengths: list[int]) -> list[list[int]]:
    """Return prompts that share nothing but their vocabulary."""
    return [[(token + 5 * place) % VOCABULARY for token in prompt(n)] for place, n in enumerate(lengths)]


def drafter_of(name: str, file: str, which: int) -> Callable[[], Drafter]:
    return lambda: example_in_turn(file, lm(name), which)


def of_steps(result: Generation) -> list[tuple[int, ...]]:
    return [(step.drafted, step.depth, step.accepted, step.emitted) for step in result.steps]


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    file=st.sampled_from(sorted(DRAFTERS)),
    which=st.integers(0, 3),
    policy=st.sampled_from(sorted(POLICIES)),
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    batch_size=st.integers(1, 4),
    k=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.9]),
    count=st.integers(1, 12),
)
def test_each_prompt_gets_what_it_gets_alone(
    name: str,
    file: str,
    which: int,
    policy: str,
    lengths: list[int],
    batch_size: int,
    k: int,
    temperature: float,
    count: int,
) -> None:
    """Guards against padding that is attended to or stored, a row that reads another's slots, and a prompt whose steps
    or randomness depend on the other prompts.
    """
    make, prompts = drafter_of(name, file, which), texts(lengths)
    make_controller = functools.partial(FixedK, k) if k else AdaptiveK
    together = generate_batch(
        lm(name),
        prompts,
        batch_size=batch_size,
        drafter=make,
        controller=make_controller,
        policy=POLICIES[policy],
        sampling=Sampling(temperature, seed=11),
        max_new_tokens=count,
    )
    for place, (text, result) in enumerate(zip(prompts, together, strict=True)):
        alone = generate(
            lm(name),
            text,
            drafter=make(),
            controller=make_controller(),
            policy=POLICIES[policy],
            sampling=Sampling(temperature, seed=11 + place),
            max_new_tokens=count,
        )
        assert result.tokens == alone.tokens
        assert of_steps(result) == of_steps(alone)
        assert result.compressions == alone.compressions
        assert result.cache_bytes == alone.cache_bytes


def test_rows_leave_and_join_in_the_middle() -> None:
    """Guards against errors that hide while all rows end at the same step. Here the texts end at different stop tokens,
    drafts are accepted in part, and new prompts replace the finished ones.
    """
    target, prompts = lm("llama"), texts([9, 30, 2, 17, 14, 25])
    whole = [generate(target, text, max_new_tokens=40).tokens for text in prompts]
    stops = [tokens[5 + 6 * place] for place, tokens in enumerate(whole)]
    expected = [generate(target, text, max_new_tokens=40, stop_token_ids=stops) for text in prompts]
    draft, rows = target.subset([0, 1, 3]), []
    with target.model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    ):
        results = generate_batch(
            target,
            prompts,
            batch_size=3,
            drafter=lambda: ModelDrafter(draft, StaticTree((2, 1))),
            max_new_tokens=40,
            stop_token_ids=stops,
        )
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert len({len(result.steps) for result in results}) > 2
    assert {1, 2, 3} <= set(rows)


def test_a_forward_is_shared() -> None:
    """Guards against a batch that decodes its prompts one after the other."""
    target, prompts = LM(build({**_SHAPE})), texts([6, 9, 12, 3])
    forwards: list[torch.Size] = []
    target.model.register_forward_hook(
        lambda module, args, kwargs, output: forwards.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    generate_batch(target, prompts, max_new_tokens=10)
    # One forward for each prompt without its last token, and ten shared ones.
    assert forwards == [(1, 5), (1, 8), (1, 11), (1, 2), *[(4, 1)] * 10]


_SHAPE = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def test_slots_of_a_batch_grow_together() -> None:
    """Guards against a row that outgrows the shared tensors and continues in its own, which no forward reads."""
    target = lm("llama")
    rows = [target.new_slots(2), target.new_slots(40)]
    own = texts([5, 9])
    for slots, text in zip(rows, own, strict=True):
        target.forward(slots, torch.tensor(text[:-1]))
    batch = SlotBatch(rows)
    for _ in range(60):
        seen = target.forward_trees(batch, [text[-1:] for text in own], [DraftTree.empty(), DraftTree.empty()])
        for text, logits in zip(own, seen, strict=True):
            text.append(int(logits[-1].argmax()))
    for text, start in zip(own, texts([5, 9]), strict=True):
        assert text == start + generate(target, start, max_new_tokens=60).tokens
    assert rows[0].capacity == rows[1].capacity >= 68


def test_what_no_row_has_written_does_not_reach_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against uninitialised memory in a result: attention of zero times NaN is NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
    results = generate_batch(lm("llama"), texts([1, 20, 7]), drafter=PromptLookup, max_new_tokens=12)
    for text, result in zip(texts([1, 20, 7]), results, strict=True):
        assert result.tokens == generate(lm("llama"), text, max_new_tokens=12).tokens


def test_the_distribution_of_a_batch_is_the_product_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    """Guards against rows that share a random number, or use another row's draft distribution. The test enumerates
    every random decision of both rows.
    """
    sampling, draft = Sampling(0.8, top_k=2), enumerated_model(1)
    prompts, length = [PROMPT, PROMPT[:-1]], 3  # the first step drafts nothing

    def run(rng: BranchRng) -> tuple[tuple[int, ...], ...]:
        monkeypatch.setattr(Sampling, "rng", lambda self, *ranks: rng)
        results = generate_batch(
            enumerated_model(0, layers=2),
            prompts,
            drafter=lambda: ModelDrafter(draft),
            controller=lambda: FixedK(1),
            sampling=sampling,
            max_new_tokens=length,
        )
        assert all(result.drafted for result in results)
        return tuple(tuple(result.tokens) for result in results)

    distribution = distribution_of(run)
    assert sum(distribution.values()) == pytest.approx(1.0, abs=1e-9)
    first = target_distribution(sampling, length)
    second: dict[tuple[int, ...], float] = {}
    for (_, tokens), weight in distribution.items():
        second[tokens] = second.get(tokens, 0.0) + weight
    alone = distribution_of(
        lambda rng: (
            monkeypatch.setattr(Sampling, "rng", lambda self, *ranks: rng),
            tuple(generate(enumerated_model(0, layers=2), prompts[1], sampling=sampling, max_new_tokens=length).tokens),
        )[1]
    )
    assert distance(second, alone) < 1e-9
    product = {(a, b): p * q for a, p in first.items() for b, q in alone.items()}
    assert distance(distribution, product) < 1e-9


def test_a_batch_with_a_seed_repeats() -> None:
    """Guards against randomness outside the seed, and against equal samples for a prompt that is given twice."""

    def sample(seed: int) -> list[list[int]]:
        prompts = [prompt(), prompt(), prompt()]
        results = generate_batch(lm("llama"), prompts, sampling=Sampling(1.0, seed=seed), max_new_tokens=12)
        return [result.tokens for result in results]

    assert sample(3) == sample(3) != sample(4)
    assert len({tuple(tokens) for tokens in sample(3)}) == 3


def test_steps_are_reported_with_their_prompt() -> None:
    """Guards against a stream that mixes up the texts."""
    told: dict[int, list[int]] = {}
    results = generate_batch(
        lm("llama"),
        texts([8, 3, 12]),
        batch_size=2,
        drafter=PromptLookup,
        max_new_tokens=15,
        on_step=lambda place, tokens: told.setdefault(place, []).extend(tokens),
    )
    assert told == {place: result.tokens for place, result in enumerate(results)}


def test_no_prompts_are_no_results() -> None:
    """Guards against an error for an empty list of prompts."""
    assert generate_batch(lm("llama"), []) == []


def test_a_wrong_prompt_is_reported_before_anything_is_decoded() -> None:
    """Guards against an hour of decoding that is lost because the last prompt is wrong."""
    told: list[int] = []
    with pytest.raises(ValueError, match="prompt 2 of 3: token 97 of the prompt is outside the vocabulary"):
        generate_batch(lm("llama"), [[1], [2], [97]], on_step=lambda place, tokens: told.append(place))
    assert not told
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate_batch(lm("llama"), [[1]], batch_size=0)


def test_the_memory_of_finished_prompts_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a queue of prompts whose caches all stay in memory to the end."""
    alive: list[int] = []
    target = small()

    class Counted(Slots):
        count = 0

        def __init__(self, capacity: int, device: torch.device) -> None:
            super().__init__(capacity, device)
            Counted.count += 1

        def __del__(self) -> None:
            Counted.count -= 1

    monkeypatch.setattr(SlotBatch, "new_row", Counted)
    generate_batch(
        target,
        [prompt()] * 12,
        batch_size=2,
        max_new_tokens=6,
        policy=KeepAll(),
        on_step=lambda place, tokens: alive.append(Counted.count),
    )
    assert max(alive) <= 4

    # The last prompt to join ends first, and its slots must not wait for the others.
    alive.clear()
    prompts = texts([14, 11, 9])
    last = generate(small(), prompts[2], max_new_tokens=3).tokens
    others = [generate(small(), text, max_new_tokens=20).tokens for text in prompts[:2]]
    stop = next(token for token in last if not any(token in other for other in others))
    generate_batch(
        target,
        prompts,
        batch_size=3,
        max_new_tokens=20,
        stop_token_ids=(stop,),
        on_step=lambda place, tokens: alive.append(Counted.count),
    )
    assert alive[-1] == 2


def test_replayed_drafts_keep_their_pace_in_a_batch() -> None:
    """Guards against errors with rows of uneven pace: one row accepts everything, one nothing, and caches are evicted
    at different steps.
    """
    target, policy = lm("gpt-neox"), SinkWindow(15, sinks=2, trigger=0.5, interval=8)
    prompts = texts([14, 11, 5])
    plain = [generate(target, text, policy=policy, max_new_tokens=40) for text in prompts]
    made = iter(zip(prompts, plain, (1.0, 0.0, 0.6), strict=True))

    def replayed() -> Drafter:
        text, result, acceptance = next(made)
        return ReplayDrafter(ModelDrafter(part(target, 0)), [*text, *result.tokens], acceptance)

    results = generate_batch(target, prompts, drafter=replayed, policy=policy, max_new_tokens=40)
    assert [result.tokens for result in results] == [result.tokens for result in plain]
    assert results[0].acceptance_rate == 1.0
    assert results[1].acceptance_rate == 0.0
    assert 0.0 < results[2].acceptance_rate < 1.0
    assert all(result.compressions >= 3 for result in results)
