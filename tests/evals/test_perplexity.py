"""The losses of the evals, against evaluations that share no cache, mask or loop with this package."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from specdecode import LM, FixedK, KeepAll, NoDraft, generate
from specdecode.controllers.base import Controller
from specdecode.decoding.teacher_forced import teacher_forced
from specdecode.evals.perplexity import (
    DecodePath,
    OracleDrafter,
    compare,
    negative_log_likelihoods,
    perplexity,
    windows,
)
from specdecode.policies.sink_window import SinkWindow
from tests.helpers.discovery import DRAFTERS, POLICIES
from tests.helpers.drafts import new_examples
from tests.helpers.models import SERVED, VOCABULARY, build, lm, logits, prompt
from tests.helpers.strategies import controllers

# The rounding error of float64 over the sums of a forward.
FLOOR = 1e-10
TEXT = [(37 * i + i * i // 3 + 5) % VOCABULARY for i in range(60)]
BOUNDED = sorted(name for name, policy in POLICIES.items() if policy.interval)
DECODERS: dict[str, tuple[Callable[[Sequence[int]], object], int]] = {
    "one by one": (lambda text: NoDraft(), 1),
    "chains": (OracleDrafter, 5),
    "wrong siblings": (partial(OracleDrafter, branches=2), 3),
}


def path(decoder: str, target: LM, policy: str = "keep-all") -> DecodePath:
    drafter, k = DECODERS[decoder]
    return DecodePath(target, POLICIES[policy], drafter, partial(FixedK, k))


def rounding(policy: str) -> float:
    """Return the rounding error: transformers' plain attention, which a policy may need, computes its softmax in
    float32.
    """
    return 1e-4 if POLICIES[policy].reads_attention else FLOOR


@functools.cache
@torch.inference_mode()
def strided(name: str, size: int, stride: int) -> list[float]:
    """Return the losses of TEXT by the usual evaluation of a text that is longer than a model's context.

    It runs forwards without a cache over windows. The labels of tokens that an earlier window has scored are masked.
    """
    target, tokens = lm(name), TEXT
    losses: list[float] = []
    judged = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + size, len(tokens))
        new = end - judged
        ids = torch.tensor([tokens[begin:end]], device=target.device)
        labels = ids.clone()
        labels[:, : end - begin - new] = -100
        given = target.model(ids, use_cache=False).logits[0, :-1]
        each = cross_entropy(given, labels[0, 1:], ignore_index=-100, reduction="none")
        losses += each[labels[0, 1:] != -100].tolist()
        judged = end
        if end == len(tokens):
            break
    return losses


# Each decoder meets all models, and so does each form of windows.
WINDOWS = [(60, 30), (16, 8), (20, 1), (23, 22), (59, 58), (200, 100)]
MODELS = ["llama", "gpt-2", "gemma3-window"]


@pytest.mark.parametrize(
    ("name", "size", "stride", "decoder"),
    [
        (MODELS[(row + column) % len(MODELS)], *sizes, decoder)
        for row, sizes in enumerate(WINDOWS)
        for column, decoder in enumerate(DECODERS)
    ],
)
def test_the_full_cache_has_the_perplexity_of_transformers_alone(
    name: str, size: int, stride: int, decoder: str
) -> None:
    """Guards against targets that are off by one, a cache that is not emptied between windows, and tokens that are
    scored twice or never.
    """
    found = negative_log_likelihoods(path(decoder, lm(name)), TEXT, size, stride)
    expected = strided(name, size, stride)
    assert len(found) == len(TEXT) - 1
    assert found.tolist() == pytest.approx(expected, abs=FLOOR)
    assert perplexity([found]) == pytest.approx(torch.tensor(expected).mean().exp().item())


@given(length=st.integers(2, 60), size=st.integers(2, 60), data=st.data())
def test_windows_judge_every_token_once_with_enough_before_it(length: int, size: int, data: st.DataObject) -> None:
    """Guards against a last window that is left out, or begins behind the text."""
    stride = data.draw(st.integers(1, size - 1))
    found = windows(length, size, stride)
    assert [place for begin, first, end in found for place in range(first, end)] == list(range(1, length))
    for begin, first, end in found:
        assert first - begin >= (min(size - stride, length - 1) if begin else 1)
        assert end - begin <= size


@settings(max_examples=30)
@given(
    name=st.sampled_from(SERVED),
    policy=st.sampled_from(sorted(POLICIES)),
    file=st.sampled_from(sorted(DRAFTERS)),
    make_controller=controllers(),
    data=st.data(),
)
def test_what_is_lossless_is_at_the_numeric_floor(
    name: str, policy: str, file: str, make_controller: Callable[[], Controller], data: st.DataObject
) -> None:
    """Guards against a drafter, tree or controller that changes a token's distribution but not its mode, or that moves
    the evictions of a policy.
    """
    drafter = data.draw(st.sampled_from(sorted(new_examples(file, lm(name)))))
    plain = DecodePath(lm(name), POLICIES[policy], lambda text: NoDraft())
    other = DecodePath(lm(name), POLICIES[policy], lambda text: new_examples(file, lm(name))[drafter], make_controller)
    reference, found = compare(plain, {"other": other}, TEXT[:32])
    floor = rounding(policy)
    assert found["other"].nll.tolist() == pytest.approx(reference.tolist(), abs=floor)
    assert found["other"].kl.abs().max() < FLOOR
    assert found["other"].agrees.all()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("start", [1, 14, 40])
def test_a_forced_text_has_the_probabilities_with_which_it_was_written(policy: str, start: int) -> None:
    """Guards against evictions at other places than in decoding, in the prompt or behind it."""
    written = generate(lm("llama"), prompt(start), policy=POLICIES[policy], max_new_tokens=30, logprobs=True)
    text = [*prompt(start), *written.tokens]
    steps = DecodePath(lm("llama"), POLICIES[policy], partial(OracleDrafter, branches=2)).forced_steps(text, start)
    found = torch.cat([step.logits.log_softmax(-1) for step in steps])
    assert found.argmax(-1).tolist() == written.tokens
    assert found.amax(-1).tolist() == pytest.approx(written.logprobs, abs=rounding(policy))


def test_the_distance_from_the_last_eviction_is_told() -> None:
    """Guards against curves over a distance that is off by one, or counted from the start of a step."""
    policy = SinkWindow(16, sinks=2, trigger=1.0, interval=5)  # leaves 11; evicts at 15, 20, 25, ...
    _, found = compare(DecodePath(lm("llama")), {"it": DecodePath(lm("llama"), policy)}, TEXT[:28])
    # Token 15 follows 15 read ones and is still chosen before the eviction, because the root is not read yet.
    assert found["it"].since.tolist() == [0] * 15 + [1, 2, 3, 4, 5] * 2 + [1, 2]
    assert (found["it"].kl[:15] < FLOOR).all()
    assert found["it"].kl[15] > 1e-4


@pytest.mark.parametrize("policy", ["sink-window", "heavy-hitter", "key-norm"])
def test_divergence_is_that_of_the_two_distributions(policy: str) -> None:
    """Guards against a KL in the wrong direction, a KL between different tokens, and a KL that changes because another
    decode path of the same model records attention.
    """
    target = lm("gpt-neox")
    lossy = DecodePath(target, POLICIES[policy], lambda text: NoDraft())
    log_probs = torch.cat([step.logits for step in lossy.forced_steps(TEXT)]).log_softmax(-1)
    full = logits(target.model, TEXT)[:-1].log_softmax(-1)
    expected = (full.exp() * (full - log_probs)).sum(-1)
    wide = DecodePath(target, POLICIES[policy], controller=partial(FixedK, 7))
    ways = {"narrow": lossy, "wide": wide, "full": path("chains", target)}
    reference, found = compare(DecodePath(target), ways, TEXT)
    wanted = torch.tensor(TEXT[1:])[:, None]
    assert reference.tolist() == pytest.approx((-full.gather(1, wanted))[:, 0].tolist(), abs=FLOOR)
    assert found["full"].kl.abs().max() < FLOOR
    assert expected.max() > 0.01
    for name in ("narrow", "wide"):
        floor = rounding(policy)
        assert found[name].kl.tolist() == pytest.approx(expected.tolist(), abs=floor)
        assert found[name].nll.tolist() == pytest.approx((-log_probs.gather(1, wanted))[:, 0].tolist(), abs=floor)
        assert found[name].agrees.tolist() == (full.argmax(-1) == log_probs.argmax(-1)).tolist()
        assert not found[name].agrees.all()


def test_a_document_does_not_know_of_the_one_before_it() -> None:
    """Guards against a cache, a drafter or a controller that keeps state from one text to the next."""
    way = path("wrong siblings", lm("llama"), "heavy-hitter")
    alone = negative_log_likelihoods(way, TEXT)
    negative_log_likelihoods(way, TEXT[::-1])
    assert negative_log_likelihoods(way, TEXT).tolist() == alone.tolist()


def test_no_document_is_held_as_logits() -> None:
    """Guards against an evaluation that needs gigabytes for a page of text with a real vocabulary."""
    most = calls = 0

    def held() -> dict[int, int]:
        alive = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape[-1:] == (VOCABULARY,)]
        return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in alive}

    # Leave out the tensors that other tests keep.
    before = held()

    def look(judged: int) -> None:
        nonlocal most, calls
        calls += 1
        if calls % 16:
            return
        most = max(most, sum(size for place, size in held().items() if place not in before))

    target = lm("llama")
    ways = {
        "one by one": DecodePath(target, drafter=lambda text: NoDraft()),
        "wide": DecodePath(target, controller=partial(FixedK, 9)),
    }
    compare(DecodePath(target, controller=partial(FixedK, 6)), ways, TEXT * 3, tell=look)
    assert 0 < most < 60 * VOCABULARY * 8


def test_int8_weights_can_be_judged() -> None:
    """Guards against a lossy part that is compared with itself."""
    target = LM(build({**lm("llama").model.config.to_dict()}).float())
    _, found = compare(DecodePath(target), {"int8": DecodePath(target.quantized("int8"))}, TEXT)
    assert 1e-6 < found["int8"].kl.mean() < 0.1


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: windows(1), "1 tokens cannot be read in windows"),
        (lambda: windows(9, 4, 4), "stride is 4: it is from 1 to 3"),
        (lambda: windows(9, 4, 0), "stride is 0"),
        (lambda: next(teacher_forced(lm("llama"), TEXT, len(TEXT))), "60 are the prompt"),
        (lambda: next(teacher_forced(lm("llama"), [1, VOCABULARY])), f"token {VOCABULARY} of the text is outside"),
        (lambda: negative_log_likelihoods(DecodePath(lm("llama")), TEXT * 9), "exceed the context of llama"),
        (
            lambda: compare(DecodePath(lm("llama")), {"it": DecodePath(LM(build(_narrower())))}, TEXT),
            "it cannot be compared: its vocabulary has 50 tokens",
        ),
    ],
)
def test_what_cannot_be_judged_is_told_in_one_sentence(call: Callable[[], object], reason: str) -> None:
    """Guards against an obscure error from inside a forward, or a meaningless number."""
    with pytest.raises(ValueError, match=reason):
        call()


def _narrower() -> dict[str, object]:
    return {**lm("llama").model.config.to_dict(), "vocab_size": 50}


def test_a_policy_reads_what_no_context_holds() -> None:
    """Guards against a bounded cache whose text must still fit into the model's context."""
    way = DecodePath(lm("llama"), SinkWindow(64))
    assert len(negative_log_likelihoods(way, TEXT * 9)) == 9 * len(TEXT) - 1
    assert KeepAll().interval == 0
