"""The tokens of every model, draft and tree shape against transformers' own `generate`.

That function shares no cache, mask or loop with this package.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.gemma3 import modeling_gemma3

from specdecode import (
    LM,
    BestFirstTree,
    Chain,
    DraftTree,
    FixedK,
    Generation,
    KeepAll,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    ReplayDrafter,
    StaticTree,
    UnsupportedModelError,
    generate,
)
from specdecode.controllers.base import Limit
from specdecode.drafters.base import Context, Drafter
from specdecode.policies.base import CachePolicy
from specdecode.policies.sink_window import SinkWindow
from tests.helpers.discovery import DRAFTERS
from tests.helpers.drafts import example_in_turn, part
from tests.helpers.models import ARCHITECTURES, REFUSED, WINDOW, build, continuation, greedy, lm, logits, prompt

# With gpt-2, a text as short as this still has several different tokens. It is longer than every window and cache here.
LENGTH = 24
# Long enough for every number of accepted tokens.
LONG = 36
SHAPES = [Chain(), StaticTree((3, 2, 1)), BestFirstTree(nodes=12, threshold=0.01)]


def decode(name: str, drafter: Drafter, k: int = 5, length: int = LENGTH) -> Generation:
    return generate(lm(name), prompt(), drafter=drafter, controller=FixedK(k), max_new_tokens=length)


@dataclass
class Hostile:
    """A drafter that proposes any tokens but the right ones, as a chain or as several chains."""

    right: Sequence[int]
    width: int
    forwards: int = 0
    layers: tuple[int, ...] = ()

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        place = len(context.tokens) - len(prompt())
        tokens = [
            (self.right[place + depth] + 1 + branch) % context.vocab_size
            for branch in range(self.width)
            for depth in range(limit.depth)
        ]
        parents = [branch * limit.depth + d if d else 0 for branch in range(self.width) for d in range(limit.depth)]
        return DraftTree(torch.tensor(tokens), torch.tensor(parents))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_models_say_something(name: str) -> None:
    """Guards against test models that repeat one token, for which every cache and mask seems right."""
    assert len(set(greedy(name, LONG))) >= 10
    assert len(set(greedy(name, LENGTH))) >= 8
    assert "window" not in name or len(prompt()) > WINDOW


# These drafters read no layer of the target: to them an architecture is only its tokens.
BY_TOKENS = ("cascade", "lookup", "none", "replay", "universal")


@pytest.mark.parametrize(
    ("name", "file", "turn"),
    [
        (name, file, row // len(BY_TOKENS) if file in BY_TOKENS else row)
        for row, name in enumerate(ARCHITECTURES)
        for file in DRAFTERS
        if file not in BY_TOKENS or file == BY_TOKENS[row % len(BY_TOKENS)]
    ],
)
def test_every_drafter_s_tokens_are_those_of_transformers(name: str, file: str, turn: int) -> None:
    """Guards against wrong tokens from a wrong mask, position, slot or window, in any architecture with any drafter.

    The examples of a drafter differ mostly in the shape of their trees. Each architecture meets one example of each
    drafter that reads its layers, one of another drafter, and every shape in the tests of `SHAPES`.
    """
    drafter = example_in_turn(file, lm(name), turn)
    assert decode(name, drafter, k=3).tokens == greedy(name, LENGTH)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_right_where_drafts_are_accepted_and_rejected(name: str, shape: object) -> None:
    """Guards against slots that are wrong only after a path is kept in part. The draft is right three times in five, so
    that some steps accept nothing, some one token, and some more.
    """
    text = [*prompt(), *greedy(name, LONG)]
    drafter = ReplayDrafter(ModelDrafter(part(lm(name), 0), shape), text, acceptance=0.6)
    result = decode(name, drafter, k=3, length=LONG)
    assert result.tokens == greedy(name, LONG)
    assert len(result.accepted_lengths) >= 3
    assert all(steps > 0 for steps in result.accepted_lengths)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_draft_equal_to_the_target_is_always_accepted(name: str, shape: object) -> None:
    """Guards against a draft whose cache is a token behind or ahead: the output stays right, but nothing is
    accepted.
    """
    result = decode(name, ModelDrafter(lm(name), shape), k=3)
    assert result.tokens == greedy(name, LENGTH)
    if isinstance(shape, BestFirstTree):
        # The best paths need not contain the best token of every node, but the first level does.
        assert result.acceptance_by_position[0] == 1.0
    else:
        assert result.acceptance_by_position == [1.0] * 3
        # The first token comes without a draft.
        assert len(result.steps) == 1 + math.ceil((LENGTH - 1) / 4)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hostile_draft_costs_no_token(name: str, width: int) -> None:
    """Guards against rejected proposals that stay in the cache."""
    result = decode(name, Hostile(greedy(name, LENGTH), width))
    assert result.tokens == greedy(name, LENGTH)
    assert result.accepted == 0
    assert result.acceptance_rate == 0.0
    assert len(result.steps) == LENGTH


@pytest.mark.parametrize("k", [1, 2, 7])
def test_a_draft_of_part_of_the_target_is_sometimes_right(k: int) -> None:
    """Guards against a subset of layers that computes nonsense: with most layers kept, it must agree with the target in
    some steps and not in others.
    """
    result = decode("llama", ModelDrafter(part(lm("llama"), 0, 1, 3)), k)
    assert result.tokens == greedy("llama", LENGTH)
    assert any(step.accepted for step in result.steps)
    assert any(step.accepted < step.drafted for step in result.steps)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3-window", "qwen2-window"])
def test_a_subset_is_the_model_of_those_layers(name: str) -> None:
    """Guards against a layer that writes into another's slots or keeps the other kind of attention, and a subset that
    changes its original model.
    """
    target, layers = lm(name), [0, 2, 3]
    before = logits(target.model, prompt())
    subset = target.subset(layers)
    values = dict(ARCHITECTURES[name], num_hidden_layers=3)
    kinds = getattr(target.model.config, "layer_types", None)
    if kinds and len(set(kinds)) > 1:
        values["layer_types"] = [kinds[layer] for layer in layers]
    smaller = build(values)
    state = {}
    for key, value in target.model.state_dict().items():
        parts = key.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if place is not None:
            if int(parts[place]) not in layers:
                continue
            parts[place] = str(layers.index(int(parts[place])))
        state[".".join(parts)] = value
    smaller.load_state_dict(state)
    tokens = list(prompt())
    slots = subset.new_slots(4)
    seen = subset.forward(slots, torch.tensor(tokens), rows=len(tokens))
    own = smaller(torch.tensor([tokens], device=smaller.device), use_cache=False).logits[0]
    torch.testing.assert_close(seen, own.detach())
    # It is a complete model for transformers too, which can draft with it and its own cache.
    assert generate(subset, tokens, max_new_tokens=8).tokens == continuation(subset.model, tokens, 8)
    assert torch.equal(logits(target.model, prompt()), before)
    with subset.model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("a hook of the subset")):
        logits(target.model, prompt())
    ours = {parameter.data_ptr() for parameter in target.model.parameters()}
    assert {parameter.data_ptr() for parameter in subset.model.parameters()} <= ours


def test_a_model_without_a_list_of_layers_has_no_subset() -> None:
    """Guards against an obscure error for a model whose layers are called in another way."""
    model = build(ARCHITECTURES["llama"])
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="llama has no list of 4 layers"):
        LM(model, name="llama").subset([0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decoded_exactly_is_refused(name: str) -> None:
    """Guards against silently wrong tokens: from positions by slot, a recurrent state, or a window over slots."""
    values, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"cannot be decoded exactly.*{reason}"):
        LM(build(values))


def test_an_encoder_decoder_is_refused() -> None:
    """Guards against an obscure error for a model that reads two texts."""
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(UnsupportedModelError, match="it is an encoder-decoder model"):
        LM(T5ForConditionalGeneration(T5Config(**shape)))


def test_a_kernel_without_a_mask_is_refused() -> None:
    """Guards against an attention kernel that is causal by itself, and would let siblings see each other."""
    model = build(ARCHITECTURES["llama"])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="'flash_attention_2' takes no 4-D mask"):
        LM(model)


def test_a_model_that_ignores_the_mask_is_found_out_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against trust in configurations: only the logits of an unknown architecture show whether it honours the
    mask.
    """
    model = build(ARCHITECTURES["llama"])
    forward = model.forward

    def causal(*, attention_mask: torch.Tensor, input_ids: torch.Tensor, **others: object) -> object:
        count, length = attention_mask.shape[-2:]
        ignored = attention_mask.new_full((count, length), torch.finfo(torch.float64).min)
        return forward(input_ids=input_ids, attention_mask=ignored.triu(length - count + 1)[None, None], **others)

    def either(*args: torch.Tensor, **kwargs: object) -> object:
        return causal(**kwargs) if "attention_mask" in kwargs else forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", either)
    with pytest.raises(UnsupportedModelError, match="gives other logits than the same tokens in sequence"):
        LM(model)


@pytest.mark.parametrize("name", ["llama", "gemma3-window"])
def test_a_window_that_the_code_does_not_keep_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a wrong token far into a text, where the configuration declares a window and the code ignores it.
    In a text as short as the probe, the window has no effect.
    """
    model = build(ARCHITECTURES[name])
    model.config.sliding_window = 4096
    if name == "gemma3-window":
        monkeypatch.setattr(modeling_gemma3, "create_sliding_window_causal_mask", modeling_gemma3.create_causal_mask)
    with pytest.raises(UnsupportedModelError, match="the code does not follow the configuration"):
        LM(model)
    assert model.config.sliding_window == 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_probe_lets_rounding_pass(dtype: torch.dtype) -> None:
    """Guards against a check so strict that it refuses common models."""
    for name in ("llama", "gpt-neox"):
        assert LM(build(ARCHITECTURES[name]).to(dtype)).dtype == dtype


def test_the_caller_s_model_is_left_as_it_is() -> None:
    """Guards against a wrapper that changes a model which other code uses too."""
    model = build(ARCHITECTURES["gemma3-window"])
    before = logits(model, prompt())
    settings = model.config.to_dict()
    LM(model).subset([0, 1])
    assert torch.equal(logits(model, prompt()), before)
    assert model.config.to_dict() == settings


# The order of tokens and evictions alone defines a lossy cache, whatever the drafts.


@functools.cache
def one_by_one(name: str, policy: CachePolicy) -> tuple[list[int], int]:
    """Return the tokens and evictions of a policy by its definition.

    Tokens are decoded one at a time, with an eviction at every multiple of the interval at which there are too many.
    """
    target, tokens, evictions = lm(name), list(prompt()), 0
    slots = target.new_slots(4)
    for read in itertools.count(1):
        scores = target.forward(slots, torch.tensor(tokens[read - 1 : read]))[0]
        if read == len(tokens):
            tokens.append(int(scores.argmax()))
        if len(tokens) == len(prompt()) + LENGTH:
            return tokens[len(prompt()) :], evictions
        if read % policy.interval == 0 and slots.length > policy.keeps:
            target.rerotation.evict(slots, policy.keep(slots))
            evictions += 1
    raise AssertionError


CACHE = SinkWindow(15, sinks=2, trigger=0.5, interval=8)


def drafters(name: str, turn: int) -> Iterator[Drafter]:
    text = [*prompt(), *one_by_one(name, CACHE)[0]]
    for file in DRAFTERS:
        yield example_in_turn(file, lm(name), turn)
    for shape in SHAPES:
        yield ReplayDrafter(ModelDrafter(part(lm(name), 0), shape), text, acceptance=0.8)


POLICY_CASES = [("llama", 1), ("llama", 3), ("gpt-neox", 11), ("gemma3-window", 4)]


@pytest.mark.parametrize(("name", "k"), POLICY_CASES)
def test_a_policy_s_tokens_do_not_depend_on_the_drafts(name: str, k: int) -> None:
    """Guards against eviction at the ends of steps: every drafter would give other tokens, and lossless would mean
    nothing.
    """
    expected, evictions = one_by_one(name, CACHE)
    assert evictions >= 3
    assert expected != greedy(name, LENGTH)
    full = decode(name, NoDraft()).cache_bytes
    for drafter in drafters(name, POLICY_CASES.index((name, k))):
        result = generate(
            lm(name), prompt(), drafter=drafter, controller=FixedK(k), policy=CACHE, max_new_tokens=LENGTH
        )
        assert result.tokens == expected
        assert result.compressions == evictions
        assert result.cache_bytes < full


def test_the_full_cache_holds_every_token_but_the_last() -> None:
    """Guards against rejected proposals counted as memory, and slots held for a token that is not read yet."""
    bytes_of_a_token = 4 * 2 * 2 * 8 * 8  # layers x (keys, values) x heads x width x bytes of a float64
    for drafter in (NoDraft(), PromptLookup(), Hostile(greedy("llama", LENGTH), 3)):
        result = generate(lm("llama"), prompt(), drafter=drafter, policy=KeepAll(), max_new_tokens=LENGTH)
        assert result.cache_bytes == (len(prompt()) + LENGTH - 1) * bytes_of_a_token
        assert result.compressions == 0
