"""Stop strings, and the log-probabilities of the output tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.stopping_criteria import StopStringCriteria

from specdecode import (
    LM,
    DraftTree,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    Sampling,
    SinkWindow,
    SpecDecoder,
    StaticTree,
    generate,
    generate_batch,
    load,
)
from specdecode.controllers.base import Limit
from specdecode.core.stopping import Stops
from specdecode.drafters.base import Context, Drafter
from specdecode.models.spelling import Spelling
from tests.helpers.characters import save
from tests.helpers.fuzzing import fuzzed
from tests.helpers.models import ARCHITECTURES, build, lm, logits, prompt
from tests.helpers.spelling import byte_pairs, characters, pieces, words

LENGTH = 24


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load(str(save(tmp_path_factory.mktemp("model"))), dtype="float64", device="cpu")


class Known:
    """A drafter that proposes the coming text, so that stops fall inside blocks."""

    forwards = 0
    layers = ()

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def propose(self, context: Context, limit: Limit) -> DraftTree:
        place = len(context.tokens)
        return DraftTree.chain(torch.tensor(self.text[place : place + limit.depth], dtype=torch.long))


def drafters(target: LM, text: list[int]) -> list[Drafter]:
    draft = target.subset([0, 1, 3])
    return [NoDraft(), Known(text), PromptLookup(), ModelDrafter(draft), ModelDrafter(draft, StaticTree((3, 2, 1)))]


@pytest.mark.parametrize("place", [0, 6, LENGTH - 3])
@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_string_ends_the_text_where_it_is_complete(target: LM, place: int, size: int) -> None:
    """Guards against a stop string that is missed unless it ends a step, or lies within one step."""
    start = target.encode("once upon a")
    whole = generate(target, start, max_new_tokens=LENGTH)
    text = target.decode(whole.tokens)
    string = text[place : place + size]
    last = text.index(string) + size
    for drafter in drafters(target, start + whole.tokens):
        result = generate(target, start, drafter=drafter, max_new_tokens=LENGTH, stop=string)
        assert result.tokens == whole.tokens[:last]
        assert result.finish_reason == "stop"
        assert sum(step.emitted for step in result.steps) == last


def test_the_first_of_several_strings_ends_the_text(target: LM) -> None:
    """Guards against an end that depends on the order of the strings, and against a string in the prompt that stops the
    text.
    """
    start = target.encode("the end")
    whole = generate(target, start, max_new_tokens=LENGTH).tokens
    text = target.decode(whole)
    assert "end" not in text
    early, late = text[4:6], text[18:21]
    result = generate(target, start, max_new_tokens=LENGTH, stop=["end", late, early])
    assert result.tokens == whole[: text.index(early) + 2]
    assert generate(target, start, max_new_tokens=LENGTH, stop=["end"]).finish_reason == "length"


def test_stop_strings_end_the_texts_of_a_batch_and_of_a_bounded_cache(target: LM) -> None:
    """Guards against a stop string that has no effect in a batch or with a bounded cache."""
    starts, policy = [target.encode("alpha"), target.encode("a longer beginning")], SinkWindow(16)
    whole = [generate(target, start, policy=policy, max_new_tokens=LENGTH).tokens for start in starts]
    string = target.decode(whole[0])[16:18]
    results = generate_batch(target, starts, policy=policy, max_new_tokens=LENGTH, stop=[string])
    for tokens, result in zip(whole, results, strict=True):
        place = target.decode(tokens).find(string)
        assert result.tokens == (tokens if place < 0 else tokens[: place + 2])
    assert results[0].finish_reason == "stop"


def a_byte(token: int) -> bytes | None:
    """Return the spelling of a token by a tokenizer of 256 bytes, or None for a larger token."""
    return bytes([token]) if token < 256 else None


def test_a_character_of_several_tokens_is_found() -> None:
    """Guards against a stop string that is missed because a token is only a part of a character."""
    data = "so: \N{EURO SIGN}\N{PILE OF POO}!".encode()
    stops = Stops([], ["\N{PILE OF POO}"], a_byte)
    assert stops.find([], list(data)) == len(data) - 2
    assert stops.find(list(data[:-4]), list(data[-4:])) == 2
    assert stops.find([], list(data[:-2])) is None


def test_only_new_tokens_end_a_text() -> None:
    """Guards against a text that is ended twice."""
    stops = Stops([7], [], None)
    assert stops.find([], [7, 1, 7]) == 0
    assert stops.find([7], [1, 7]) == 1
    assert stops.find([7], [1]) is None


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there() -> None:
    """Guards against a missed stop string, such as a mark, whose first part is in the prompt."""
    stops = Stops([], ["###", "."], a_byte)
    assert stops.find(list(b"1.##"), list(b"#2")) == 0
    assert stops.find(list(b"1.###"), list(b"2")) is None
    assert stops.find(list(b"###"), list(b"#")) == 0


def test_a_token_without_text_is_no_part_of_a_string() -> None:
    """Guards against a stop string matched across a token that the tokenizer lacks, unlike in transformers."""
    stops = Stops([], ["ab"], a_byte)
    assert stops.find([97, 300], [98]) is None
    assert stops.find([300, 97], [98]) == 0


def test_the_search_costs_the_same_behind_a_long_text() -> None:
    """Guards against decoding the whole text again at each step."""
    read: list[int] = []
    stops = Stops([], ["end of it"], lambda token: read.append(token) or a_byte(token))
    assert stops.find(list(b"no end " * 10_000), list(b"of it")) == 4
    assert len(read) <= 5 * len("end of it")


# Tokenizers, with texts that they split in several ways.
TOKENIZERS = {
    "byte-level": byte_pairs(
        "the end of the end, \n\nand then 日本語", 290, {"eos_token": "</s>", "pad_token": "<|é|>"}
    ),
    "byte-fallback": pieces(["the", "end", "then"]),
    "SentencePiece": words(["the", "▁the", "▁end", "en", "d", "▁", "語", "日本", "é", "."]),
    "characters": characters(),
}
TEXTS = ["the end\n\n", " then 日本語。", "é👋🏽 the", "</s>", "."]


@st.composite
def stopped_texts(draw: st.DrawFn) -> tuple[str, list[int], int, list[str]]:
    """Draw a tokenizer's name, tokens with some broken characters, the end of the prompt, and stop strings."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    known = st.sampled_from([tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS])
    parts = draw(st.lists(known | st.lists(st.integers(0, len(tokenizer) + 1), max_size=3), min_size=1, max_size=6))
    tokens = [draw(st.integers(0, len(tokenizer) - 1)), *(token for part in parts for token in part)]
    spelling = Spelling(tokenizer)
    data = b"".join(spelling(token) or b"" for token in tokens)
    strings = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        strings.append(data[start : start + draw(st.integers(1, 12))].decode(errors="ignore") or "d.")
    return name, tokens, draw(st.integers(1, len(tokens))), strings


@pytest.mark.skipif(
    not hasattr(StopStringCriteria, "_token_to_bytes"), reason="this transformers misses parts of characters"
)
@fuzzed(60)
@given(stopped_texts(), st.integers(1, 5))
def test_texts_end_where_transformers_ends_them(case: tuple[str, list[int], int, list[str]], width: int) -> None:
    """Guards against another end than transformers': at half characters, dropped spaces, broken bytes before a
    character, or strings across the end of the prompt, of a step, or of a token.
    """
    name, tokens, start, strings = case
    stops = Stops([], strings, Spelling(TOKENIZERS[name]))
    try:
        criteria = StopStringCriteria(TOKENIZERS[name], strings)
    except ValueError:
        expected = None  # no token can end these strings
    else:
        ended = (criteria(torch.tensor([tokens[:end]]), None).item() for end in range(start + 1, len(tokens) + 1))
        expected = next((start + i for i, end in enumerate(ended) if end), None)
    found = None
    for at in range(start, len(tokens), width):
        found = stops.find(tokens[:at], tokens[at : at + width])
        if found is not None:
            found += at
            break
    assert found == expected


@pytest.mark.parametrize("name", ["byte-fallback", "SentencePiece"])
def test_a_decoder_stops_at_a_word_that_begins_the_output(name: str) -> None:
    """Guards against a missed stop string at the start of the output, where the tokenizer drops the first space."""
    tokenizer = TOKENIZERS[name]
    the = tokenizer.convert_tokens_to_ids("▁the")
    model = build(ARCHITECTURES["llama"] | {"vocab_size": len(tokenizer), "eos_token_id": None})
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[the] = 1.0  # negative, if the hidden states' sum is
    start = next(
        [token] for token in range(len(tokenizer)) if generate(LM(model), [token], max_new_tokens=1).tokens == [the]
    )
    target, ids = LM(model, tokenizer), torch.tensor([start])
    settings: dict[str, Any] = {"max_new_tokens": 6, "stop_strings": [" the"], "eos_token_id": None, "pad_token_id": 0}
    theirs = model.generate(ids, tokenizer=tokenizer, do_sample=False, **settings)
    assert SpecDecoder(target, PromptLookup).generate(ids, **settings).tolist() == theirs.tolist() == [[*start, the]]


def test_stop_strings_that_cannot_be_are_told(target: LM) -> None:
    """Guards against a text that ends before it begins, and one that never ends because the target has no tokenizer."""
    with pytest.raises(ValueError, match="a stop string is empty"):
        generate(target, [1], stop=["a", ""])
    mute = LM(build(ARCHITECTURES["llama"]), name="mute")
    with pytest.raises(ValueError, match="stop strings need a tokenizer, and the target has none"):
        generate(mute, [1], stop="a")
    with pytest.raises(ValueError, match="mute has no tokenizer"):
        mute.decode([1])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probabilities_are_those_of_a_forward_over_the_text(temperature: float) -> None:
    """Guards against log-probabilities of another node, after temperature and top-k, or beyond a stop."""
    target = lm("llama")
    sampling = Sampling(temperature, top_k=9, seed=1)
    whole = generate(target, prompt(), sampling=sampling, max_new_tokens=LENGTH).tokens
    for drafter in drafters(target, [*prompt(), *whole]):
        result = generate(
            target,
            prompt(),
            drafter=drafter,
            sampling=sampling,
            max_new_tokens=LENGTH,
            stop_token_ids=[whole[17]],
            logprobs=True,
        )
        logprobs = logits(target.model, [*prompt(), *result.tokens])[len(prompt()) - 1 : -1].log_softmax(-1)
        expected = logprobs[range(len(result.tokens)), result.tokens].cpu()
        torch.testing.assert_close(torch.tensor(result.logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-9)
    assert generate(target, prompt(), max_new_tokens=2).logprobs is None


def test_log_probabilities_of_half_precision_are_whole() -> None:
    """Guards against inexact sums over a vocabulary in sixteen bits."""
    target = LM(build(ARCHITECTURES["llama"]).bfloat16())
    result = generate(target, prompt(), max_new_tokens=8, logprobs=True)
    assert result.logprobs is not None
    assert any(torch.tensor(value).bfloat16().item() != value for value in result.logprobs)


def test_a_stop_string_given_alone_is_one_string(target: LM) -> None:
    """Guards against a string that is read as a list of its characters."""
    start = target.encode("once")
    text = target.decode(generate(target, start, max_new_tokens=LENGTH).tokens)
    string = text[10:14]
    assert target.decode(generate(target, start, max_new_tokens=LENGTH, stop=string).tokens).endswith(string)
