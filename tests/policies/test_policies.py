from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from specdecode import (
    LM,
    FixedK,
    Generation,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    ReplayDrafter,
    Sampling,
    StaticTree,
    generate,
    generate_batch,
)
from specdecode.controllers.base import Controller, Limit
from specdecode.core.errors import UnsupportedModelError
from specdecode.core.slots import Slots
from specdecode.models.rotary import Rotation
from specdecode.policies.base import CachePolicy, boundary
from specdecode.policies.heavy_hitter import HeavyHitter
from specdecode.policies.key_norm import KeyNorm
from specdecode.policies.random import Random
from specdecode.policies.sink_window import SinkWindow
from tests.helpers import families
from tests.helpers.discovery import CONTROLLERS, DRAFTERS, POLICIES
from tests.helpers.drafts import example_in_turn
from tests.helpers.lean import lean
from tests.helpers.models import ARCHITECTURES, SERVED, build, greedy, lm, logits, prompt, small
from tests.helpers.strategies import Moody

# Every policy that evicts does so at least ten times within this text.
LENGTH = 40
BOUNDED = sorted(name for name, policy in POLICIES.items() if policy.interval)


@functools.cache
def alone(name: str, policy: str, temperature: float = 0.0) -> Generation:
    """Decode autoregressively with the policy."""
    return generate(
        lm(name),
        prompt(),
        policy=POLICIES[policy],
        sampling=Sampling(temperature, seed=3),
        max_new_tokens=LENGTH,
    )


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("name", SERVED)
def test_a_policy_changes_the_output_and_bounds_the_cache(name: str, policy: str) -> None:
    """Guards against a policy that is configured and does nothing: the other tests would prove nothing."""
    result, bounds = alone(name, policy), POLICIES[policy]
    assert result.tokens != greedy(name, LENGTH)
    assert result.compressions >= 3
    full = alone(name, "keep-all")
    held = result.cache_bytes * (len(prompt()) + LENGTH - 1) / full.cache_bytes
    assert bounds.keeps < held <= bounds.keeps + bounds.interval


def moody(turn: int) -> Callable[[], Controller]:
    """Return a controller that asks for any drafts by turns."""
    chance = random.Random(turn)
    limits = [Limit(chance.randint(0, 9), chance.randint(1, 64)) for _ in range(chance.randint(2, 6))]
    return functools.partial(Moody, limits)


@pytest.mark.parametrize("file", DRAFTERS)
def test_the_tokens_are_the_same_whatever_the_drafter_and_the_controller(file: str) -> None:
    """Guards against a lossy cache whose losses depend on the drafter, tree or K, and against a draft that misses the
    steps decoded without it.

    Every policy meets every drafter, every architecture and every kind of controller, and every drafter meets every
    architecture.
    """
    for turn, policy in enumerate(POLICIES):
        place = list(DRAFTERS).index(file)
        name = SERVED[(place + turn) % len(SERVED)]
        fixed = [functools.partial(FixedK, k) for k in (1, 9)]
        kinds = [*fixed, *CONTROLLERS.values(), moody(turn), moody(100 + place)]
        result = generate(
            lm(name),
            prompt(),
            drafter=example_in_turn(file, lm(name), turn),
            controller=kinds[(place + 2 * turn) % len(kinds)](),
            policy=POLICIES[policy],
            max_new_tokens=LENGTH,
        )
        expected = alone(name, policy)
        assert result.tokens == expected.tokens, (policy, name)
        assert result.compressions == expected.compressions, (policy, name)
        assert result.cache_bytes == expected.cache_bytes, (policy, name)


def test_drafts_are_accepted_and_rejected_across_evictions() -> None:
    """Guards against a conformance test in which nothing was drafted, or every draft was wrong."""
    policy = SinkWindow(16, sinks=2, trigger=0.5)  # its interval leaves room for several proposals
    plain = generate(lm("llama"), prompt(), policy=policy, max_new_tokens=LENGTH)
    drafter = ReplayDrafter(ModelDrafter(lm("llama").subset([0])), [*prompt(), *plain.tokens], acceptance=0.7)
    result = generate(lm("llama"), prompt(), drafter=drafter, policy=policy, max_new_tokens=LENGTH)
    assert result.tokens == plain.tokens
    assert {step.accepted for step in result.steps} >= {0, 1, 2}
    assert result.compressions >= 3


def test_stop_tokens_end_a_text_with_a_policy_too() -> None:
    """Guards against stop tokens that have no effect with a policy."""
    expected = alone("llama", "sink-window").tokens
    stop = expected[25]
    end = expected.index(stop) + 1
    result = generate(
        lm("llama"),
        prompt(),
        drafter=PromptLookup(),
        policy=POLICIES["sink-window"],
        stop_token_ids=[stop],
        max_new_tokens=LENGTH,
    )
    assert result.tokens == expected[:end]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("policy", BOUNDED)
def test_a_prompt_longer_than_the_cache_is_read_with_the_same_evictions(policy: str) -> None:
    """Guards against a prefill that sees more tokens than decoding would: evictions depend on the length of the
    text.
    """
    expected = alone("llama", policy).tokens
    text = [*prompt(), *expected[:25]]
    result = generate(lm("llama"), text, policy=POLICIES[policy], max_new_tokens=LENGTH - 25)
    assert result.tokens == expected[25:]
    assert result.prefill_forwards > 3


# Moving keys.


def layer_0(target: LM, tokens: list[int]) -> torch.Tensor:
    """Return the keys of the first layer for a text read from scratch. They depend only on a token and its position."""
    slots = target.new_slots(1)
    target.forward(slots, torch.tensor(tokens))
    return slots.filled_keys()[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"gpt-2", "opt"}))
def test_rotating_again_is_pruning_first(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Guards against keys that keep the rotation of their old positions, in whole or in part."""
    target = LM(build(ARCHITECTURES[name]).to(dtype))
    tokens = [(7 * i + 3) % 50 for i in range(40)]
    kept = [0, 1, 5, 6, 17, 30, 31, 39]
    slots = target.new_slots(1)
    target.forward(slots, torch.tensor(tokens))
    target.rerotation.evict(slots, torch.tensor(kept, device=target.device))
    pruned = layer_0(target, [tokens[i] for i in kept])
    assert (slots.filled_keys()[0] - pruned).abs().max() <= tolerance * pruned.abs().max()
    rerotated = (layer_0(target, tokens)[:, kept] - pruned).abs().max()
    assert rerotated > 0.01


def test_each_head_may_keep_its_own() -> None:
    """Guards against one head's choice applied to another head or layer."""
    target = lm("llama")
    tokens = [(7 * i + 3) % 50 for i in range(20)]
    slots = target.new_slots(1)
    target.forward(slots, torch.tensor(tokens))
    generator = torch.Generator().manual_seed(0)
    choices = [[torch.randperm(20, generator=generator)[:6].sort().values for _ in range(2)] for _ in range(4)]
    kept = torch.stack([torch.stack(heads) for heads in choices]).to(target.device)
    before = [keys.clone() for keys in slots.filled_keys()]
    target.rerotation.evict(slots, kept)
    for layer, rotation in enumerate(target.rerotation._rotations):
        assert rotation is not None
        cos, sin = rotation.table(before[layer], torch.arange(20, device=target.device))
        for head in range(2):
            old = kept[layer, head]
            rerotated = rotation.rerotate(before[layer][head : head + 1, old], (cos[old], sin[old]), (cos[:6], sin[:6]))
            torch.testing.assert_close(slots.filled_keys()[layer][head], rerotated[0])
    for head in range(2):
        pruned = layer_0(target, [tokens[i] for i in kept[0, head].tolist()])
        torch.testing.assert_close(slots.filled_keys()[0][head], pruned[head])
    assert slots.length == 6
    assert slots.evicted == 14


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_a_key_that_moves_a_thousand_times_is_still_itself(dtype: torch.dtype, tolerance: float) -> None:
    """Guards against rounding errors that add up while a token stays in the cache."""
    target = LM(build(ARCHITECTURES["gpt-neox"] | {"max_position_embeddings": 2048}).to(dtype))
    rotation = target.rerotation._rotations[0]
    assert isinstance(rotation, Rotation)
    keys = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1)).to(target.device, dtype)
    cos, sin = rotation.table(keys, torch.arange(1001, device=target.device))

    def at(position: int) -> tuple[torch.Tensor, torch.Tensor]:
        return cos[position : position + 1], sin[position : position + 1]

    rerotated = keys
    for position in range(1000, 0, -1):
        rerotated = rotation.rerotate(rerotated, at(position), at(position - 1))
    assert (rerotated - rotation.rerotate(keys, at(1000), at(0))).abs().max() <= tolerance


def test_streaming_is_a_forward_over_the_kept_tokens() -> None:
    """Guards against positions, masks or keys other than StreamingLLM's: at every token, a forward from scratch over
    the sinks and the window, at positions 0, 1, 2, ...

    In a model of one layer, a token's cache entry does not depend on evicted tokens, so the comparison is exact.
    """
    target = small(num_hidden_layers=1, hidden_size=16, initializer_range=0.6)
    policy = SinkWindow(24, sinks=3, trigger=0.75, interval=5)
    held, tokens = list(prompt(9)), list(prompt(9))
    evictions = 0
    for _ in range(80):
        tokens.append(int(logits(target.model, held)[-1].argmax()))
        if (len(tokens) - 1) % policy.interval == 0 and len(held) > policy.keeps:
            held = held[:3] + held[-(policy.keeps - 3) :]
            evictions += 1
        held.append(tokens[-1])
    assert evictions > 10
    result = generate(target, prompt(9), drafter=PromptLookup(), policy=policy, max_new_tokens=80)
    assert result.tokens == tokens[9:]
    assert len(set(result.tokens)) > 5
    assert result.compressions == evictions - ((len(tokens) - 1) % policy.interval == 0)


@functools.cache
def two_layers() -> LM:
    return small(num_hidden_layers=2)


class Cached(RuleBasedStateMachine):
    """Slots of a small model under a policy, beside the list of the tokens that a sink window must hold."""

    @initialize(
        policy=st.sampled_from(
            [
                *(SinkWindow(12, sinks, trigger) for sinks in (0, 4) for trigger in (0.5, 0.9, 1.0)),
                SinkWindow(9, sinks=1, interval=3),
                KeyNorm(12, recent=3, trigger=0.5),
                HeavyHitter(12, recent=2, trigger=0.5),
                Random(10),
            ]
        )
    )
    def begin(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.lm = two_layers()
        self.slots = self.lm.new_slots(3)
        self.held: list[int] = []
        self.read = 0

    @rule(count=st.integers(1, 30))
    def decode(self, count: int) -> None:
        tokens = [(7 * (self.read + i)) % 50 for i in range(count)]
        while tokens:
            due = boundary(self.policy, self.read + 1, self.slots.length + 1)
            piece, tokens = tokens[: due - self.read], tokens[due - self.read :]
            if self.policy.reads_attention:
                with self.lm.recording_attention():
                    self.lm.forward(self.slots, torch.tensor(piece))
                self.slots.attend(range(len(piece)))
            else:
                self.lm.forward(self.slots, torch.tensor(piece))
            self.held += range(self.read, self.read + len(piece))
            self.read += len(piece)
            assert self.slots.length <= self.policy.keeps + self.policy.interval
            if self.lm.evict(self.slots, self.policy):
                assert self.read % self.policy.interval == 0
                assert self.slots.length == self.policy.keeps
                pinned = getattr(self.policy, "pinned", 0)
                self.held = self.held[:pinned] + self.held[pinned - self.policy.keeps :]
                assert not self.lm.evict(self.slots, self.policy)

    @invariant()
    def what_stays_is_in_order(self) -> None:
        if not self.slots.length:
            return
        kept = self.policy.keep(self.slots)
        assert (kept[..., 1:] > kept[..., :-1]).all()
        assert kept.min() >= 0
        assert kept.max() < self.slots.length
        assert kept.shape[-1] == min(self.policy.keeps, self.slots.length)
        recent = getattr(self.policy, "recent", 0)
        if recent and self.slots.length > self.policy.keeps:
            last = torch.arange(self.slots.length - recent, self.slots.length)
            assert (kept[..., -recent:].cpu() == last).all()

    @invariant()
    def slots_count_what_was_read(self) -> None:
        assert self.slots.committed == self.read
        assert self.slots.length == len(self.held)

    @precondition(lambda self: isinstance(self.policy, SinkWindow))
    @invariant()
    def a_sink_window_holds_the_first_and_the_last(self) -> None:
        pinned = self.policy.pinned
        assert self.held[:pinned] == list(range(min(pinned, self.read)))
        rest = self.held[pinned:]
        assert rest == list(range(self.read - len(rest), self.read))
        if self.slots.length:
            tokens = [(7 * i) % 50 for i in self.held]
            torch.testing.assert_close(self.slots.filled_keys()[0], layer_0(self.lm, tokens))


TestCached = Cached.TestCase
TestCached.settings = settings(max_examples=40, stateful_step_count=8)


def test_only_committed_tokens_count_as_attention() -> None:
    """Guards against evictions that depend on the drafts, because rejected proposals leave their attention behind."""
    target, policy = lm("llama"), HeavyHitter(400)
    seen: list[torch.Tensor] = []

    class Watched(HeavyHitter):
        def keep(self, slots: Slots) -> torch.Tensor:
            seen.append(slots.attention[:, :, : slots.length].clone())
            return super().keep(slots)

    assert policy.reads_attention
    tree = ModelDrafter(target.subset([0, 1, 3]), StaticTree((3, 2, 1)))
    for drafter in (NoDraft(), tree, PromptLookup()):
        generate(target, prompt(), drafter=drafter, policy=Watched(40), max_new_tokens=60)
    runs = len(seen) // 3
    assert runs >= 3
    for first, second, third in zip(seen[:runs], seen[runs : 2 * runs], seen[2 * runs :], strict=True):
        # transformers computes its softmax in float32.
        torch.testing.assert_close(second, first, rtol=0, atol=1e-4)
        torch.testing.assert_close(third, first, rtol=0, atol=1e-4)
    # Each query's attention sums to 1: 4 query heads over 2 key heads.
    total = seen[0].sum(2)
    torch.testing.assert_close(total, torch.full_like(total, 2.0 * seen[0].shape[2]), rtol=1e-5, atol=0)


def test_attention_is_recorded_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against gigabytes of attention weights after a long prompt: those of all layers are held at once."""
    monkeypatch.setattr("specdecode.models.forwards._RECORDED_CHUNK", 4)
    heavy, window = (
        generate(lm("llama"), prompt(14), policy=policy, max_new_tokens=2)
        for policy in (HeavyHitter(64), SinkWindow(64))
    )
    assert (heavy.prefill_forwards, window.prefill_forwards) == (3, 0)


def test_the_model_is_left_as_it_was() -> None:
    """Guards against a model that decodes more slowly, or differently, after a policy has used it."""
    target = lm("llama")
    usual = target.model.config._attn_implementation
    before = logits(target.model, prompt())
    generate(target, prompt(), policy=HeavyHitter(16), max_new_tokens=30)
    assert target.model.config._attn_implementation == usual
    torch.testing.assert_close(logits(target.model, prompt()), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="outside"):
        generate(target, [10**6], policy=HeavyHitter(16))
    assert target.model.config._attn_implementation == usual


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_five_thousand_tokens_through_a_context_of_64(unchecked: None) -> None:
    """Guards against positions beyond the context, and against memory that grows with the text."""
    target = lean(small(num_hidden_layers=1, max_position_embeddings=64, initializer_range=0.6))
    sizes: list[int] = []
    told = itertools.count()

    def listen(tokens: list[int]) -> None:
        if next(told) % 250 == 0:
            sizes.append(resident())

    class InRange(SinkWindow):
        def keep(self, slots: Slots) -> torch.Tensor:
            assert slots.positions[: slots.length].tolist() == list(range(slots.length))
            assert slots.length <= 48
            return super().keep(slots)

    policy = InRange(48)
    result = generate(target, prompt(9), drafter=PromptLookup(), policy=policy, max_new_tokens=5000, on_step=listen)
    assert len(result.tokens) == 5000
    assert result.compressions > 500
    full = generate(target, prompt(9), max_new_tokens=20).cache_bytes / 28
    assert result.cache_bytes <= 48 * full
    assert result.peak_cache_bytes <= (48 + 6) * full
    assert len(sizes) > 3
    assert max(sizes[1:]) - sizes[1] < 16 * 2**20


# Refusals.


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SinkWindow(16, trigger=0.0), "trigger is 0.0"),
        (lambda: SinkWindow(16, trigger=1.5), "trigger is 1.5"),
        (lambda: KeyNorm(16, interval=0), "interval is 0"),
        (lambda: SinkWindow(4), "max_len is 4: .* of which 4 always stay"),
        (lambda: SinkWindow(16, sinks=-1), "sinks is -1"),
        (lambda: SinkWindow(16, interval=14), "max_len is 16"),
        (lambda: HeavyHitter(8, recent=8), "max_len is 8"),
        (lambda: HeavyHitter(8, recent=-1), "recent is -1"),
        (lambda: KeyNorm(8, recent=-1), "recent is -1"),
        (lambda: ModelDrafter(lm("llama"), policy=SinkWindow(600)), "cache of 600 tokens exceeds the context of llama"),
    ],
)
def test_a_cache_that_cannot_be_is_reported(make: object, reason: str) -> None:
    """Guards against a policy that silently evicts needed tokens, or never evicts."""
    assert callable(make)
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize("policy", [SinkWindow(8), SinkWindow(256, trigger=1.0)])
def test_a_cache_that_leaves_no_room_for_drafts_is_reported(policy: SinkWindow) -> None:
    """Guards against drafts that are silently cut to nothing at every step. Plain decoding needs no room for them."""
    assert len(generate(lm("llama"), prompt(), policy=policy, max_new_tokens=20).tokens) == 20
    with pytest.raises(ValueError, match="evicts after each token, and a step ends there, so nothing can be drafted"):
        generate(lm("llama"), prompt(), drafter=PromptLookup(), policy=policy)
    (plain,) = generate_batch(lm("llama"), [prompt()], drafter=lambda: NoDraft(), policy=policy, max_new_tokens=20)
    assert len(plain.tokens) == 20
    with pytest.raises(ValueError, match="nothing can be drafted"):
        generate_batch(lm("llama"), [prompt()], drafter=PromptLookup, policy=policy)


def test_heavy_hitters_keep_half_of_what_stays() -> None:
    """Guards against a default for the recent tokens that does not fit the interval that the user chose."""
    policy = HeavyHitter(256, interval=150)
    assert (policy.keeps, policy.recent) == (106, 53)
    assert HeavyHitter(256).recent == 115


def test_a_cache_larger_than_the_context_is_reported() -> None:
    """Guards against positions that the model was not trained on."""
    with pytest.raises(ValueError, match="cache of 600 tokens exceeds the context of llama, 512 tokens"):
        generate(lm("llama"), prompt(), policy=SinkWindow(600))


def test_keys_that_cannot_be_re_rotated_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against wrong tokens on an architecture whose rotation is not known."""
    target = LM(build(ARCHITECTURES["llama"]))
    assert generate(target, prompt(), max_new_tokens=2).tokens
    monkeypatch.setattr("specdecode.models.rotary._candidates", lambda model: iter(()))
    with pytest.raises(UnsupportedModelError, match="cannot serve this llama model: the keys of its layer 0"):
        generate(target, prompt(), policy=SinkWindow(16))


@pytest.mark.parametrize(
    ("family", "policy", "reason"),
    [
        ("gemma3n_text", HeavyHitter(16), "HeavyHitter cannot choose .* as its layers read each other's keys: use"),
        ("gemma4_unified_text", HeavyHitter(16), r"different numbers of heads with keys \(1, 2\)"),
        ("gemma4_unified_text", KeyNorm(16), r"different numbers of heads with keys \(1, 2\)"),
        ("gemma3n_text", KeyNorm(16), None),
    ],
)
def test_layers_whose_heads_cannot_choose_keys_are_reported(
    family: str, policy: CachePolicy, reason: str | None
) -> None:
    """Guards against a traceback at the first eviction, after minutes of decoding."""
    target = LM(families.build(family))
    with nullcontext() if reason is None else pytest.raises(UnsupportedModelError, match=reason):
        assert generate(target, prompt(), policy=policy, max_new_tokens=20).compressions


def test_a_model_that_also_reads_pictures_evicts_as_its_text_decoder() -> None:
    """Guards against the rotation and the layers of the part that reads pictures, which comes first in such a model."""
    plain = lm("llama").model
    vision: dict[str, Any] = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = Mistral3Config(text_config=ARCHITECTURES["llama"], vision_config=vision, tie_word_embeddings=False)
    model = Mistral3ForConditionalGeneration(config).to(plain.device, plain.dtype)
    model.model.language_model.load_state_dict(plain.model.state_dict())
    model.lm_head.load_state_dict(plain.lm_head.state_dict())
    target = LM(model)
    result = generate(target, prompt(), policy=POLICIES["sink-window"], max_new_tokens=LENGTH)
    assert result.tokens == alone("llama", "sink-window").tokens
    draft, expected = (
        generate(whole.subset([0, 2]), prompt(), max_new_tokens=LENGTH).tokens for whole in (target, lm("llama"))
    )
    assert draft == expected


def test_a_draft_cannot_be_kept_by_attention() -> None:
    """Guards against a policy that needs attention weights where nothing records them."""
    with pytest.raises(ValueError, match="cannot be kept by attention"):
        ModelDrafter(lm("llama"), policy=HeavyHitter(16))
