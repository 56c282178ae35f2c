"""The settings of `SpecDecoder.generate`: the same meaning as in transformers' own `generate`, or a refusal by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer

from specdecode import LM, Generation, ModelDrafter, PromptLookup, Sampling, SpecDecoder, StaticTree, generate_batch
from tests.helpers.fuzzing import fuzzed
from tests.helpers.models import ARCHITECTURES, build, continuation, logits, prompt
from tests.helpers.spelling import characters

LENGTH = 10
IDS = torch.tensor([prompt()])
MASK = torch.ones_like(IDS)
MODEL = build(ARCHITECTURES["llama"] | {"num_hidden_layers": 2})
TARGET = LM(MODEL, characters(), name="llama")
DRAFT = TARGET.subset([0])
WHOLE = continuation(MODEL, prompt(), LENGTH)
STOP = WHOLE[5]


@contextmanager
def configured(**settings: Any) -> Iterator[SpecDecoder]:
    """Return a decoder of a model whose checkpoint has these settings."""
    usual, MODEL.generation_config = MODEL.generation_config, GenerationConfig(**settings)
    try:
        yield SpecDecoder(TARGET, lambda: ModelDrafter(DRAFT, StaticTree((2, 1))))
    finally:
        MODEL.generation_config = usual


def theirs(*arguments: Any, **settings: Any) -> torch.Tensor:
    """Return the output of transformers, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODEL.generate(*arguments, tokenizer=TARGET.tokenizer, **settings)


# Forms of values.

FORMS = {
    "eos int": {"eos_token_id": STOP},
    "eos list": {"eos_token_id": [3, STOP]},
    "eos tuple": {"eos_token_id": (3, STOP)},
    "eos none": {"eos_token_id": [], "pad_token_id": 0},
    "eos tensor": {"eos_token_id": torch.tensor([STOP])},
    "eos tensor of two": {"eos_token_id": torch.tensor([3, STOP])},
    "eos tensor of no dimension": {"eos_token_id": torch.tensor(STOP)},
    "eos numpy": {"eos_token_id": np.int64(STOP)},
    "eos array": {"eos_token_id": np.array([3, STOP])},
    "pad numpy": {"eos_token_id": STOP, "pad_token_id": np.int64(9)},
    "pad tensor": {"eos_token_id": STOP, "pad_token_id": torch.tensor(9)},
    "length numpy": {"max_new_tokens": np.int32(4)},
    "length in all": {"max_new_tokens": None, "max_length": np.int64(20)},
    "mask of truths": {"attention_mask": MASK.bool()},
    "mask of numbers": {"attention_mask": MASK.double()},
    "ids of 32 bits": {"input_ids": IDS.int()},
    "empty lists": {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()},
    "a tokenizer": {"tokenizer": TARGET.tokenizer, "stop_strings": "e"},
    "the cache of a checkpoint": {"cache_implementation": "hybrid"},
}


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_a_value_of_any_form_means_what_it_means_there(settings: dict[str, Any]) -> None:
    """Guards against a tensor that is compared as an object, and NumPy integers that are not accepted."""
    call = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": LENGTH} | settings
    with configured(pad_token_id=0) as decoder:
        assert torch.equal(
            decoder.generate(**call), theirs(**{name: value for name, value in call.items() if name != "tokenizer"})
        )


REFUSED: list[tuple[str, Any, str]] = [
    ("token_type_ids", torch.zeros_like(IDS), "a tensor of shape"),
    ("position_ids", torch.arange(14)[None], "a tensor of shape"),
    ("position_ids", torch.zeros(1, 1), "a tensor of shape"),
    ("inputs_embeds", torch.zeros(1, 14, 32), "a tensor of shape"),
    ("negative_prompt_ids", IDS, "a tensor of shape"),
    ("past_key_values", DynamicCache(), "DynamicCache"),
    ("watermarking_config", {}, "{}"),
    ("forced_eos_token_id", 0, "0"),
    ("forced_bos_token_id", 0, "0"),
    ("max_time", 0.0, "0.0"),
    ("constraints", [], r"\[\]"),
    ("bad_words_ids", [], r"\[\]"),
    ("max_new_tokens", 3.7, "3.7: it must be a whole number"),
    ("max_length", "30", "'30': it must be a whole number"),
    ("eos_token_id", "2", "'2': it must be a token id, or several"),
    ("pad_token_id", [0], r"\[0\]: it must be a whole number"),
    ("stop_strings", [1], r"\[1\]: it must be a string, or a list of them"),
    ("stop_strings", torch.tensor([1, 2]), "a tensor of shape .*: it must be a string"),
    ("stop_strings", 0, "0: it must be a string"),
    ("stop_strings", [], r"\[\]: each must be some text"),
    ("stop_strings", "", "'': each must be some text"),
    ("num_return_sequences", 0, "0: at least 1"),
    ("do_sample", torch.tensor([True, False]), "a tensor of shape .*: it must be True or False"),
    ("generation_config", {"max_new_tokens": 3}, "a dict: give a GenerationConfig"),
    ("attention_mask", MASK * 2, "0 for padding and 1 elsewhere"),
    ("use_cache", np.array([True]), r"array\(\[ True\]\)"),
]


@pytest.mark.parametrize(
    ("name", "value", "reason"), REFUSED, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(REFUSED)]
)
def test_what_is_not_meant_here_is_refused_by_name(name: str, value: Any, reason: str) -> None:
    """Guards against an error from the truth value of a tensor, and refusing values that only look different."""
    call = {"input_ids": IDS, "attention_mask": MASK, name: value}
    with configured(pad_token_id=0) as decoder, pytest.raises(ValueError, match=rf"^{name}\b.*{reason}"):
        decoder.generate(**call)


def test_prompts_come_by_either_name(unchecked: None) -> None:
    """Guards against refusing transformers' own argument name, and an obscure error for values that are no
    token ids.
    """
    with configured(pad_token_id=0) as decoder:
        expected = theirs(IDS, max_new_tokens=4)
        assert torch.equal(decoder.generate(IDS, max_new_tokens=4), expected)
        assert torch.equal(decoder.generate(inputs=IDS, max_new_tokens=4), expected)
        assert torch.equal(decoder.generate(input_ids=IDS, max_new_tokens=4), expected)
        for arguments, sentence in [
            ({"inputs": IDS, "input_ids": IDS}, "inputs and input_ids are both given"),
            ({}, "input_ids is missing"),
            ({"input_ids": IDS.tolist()}, "input_ids is a list"),
            ({"input_ids": IDS[0]}, r"input_ids has shape \(14,\)"),
            ({"input_ids": IDS[:0]}, r"input_ids has shape \(0, 14\)"),
            ({"input_ids": IDS.double()}, r"dtype torch.float64"),
            ({"input_ids": IDS[:, :0]}, "the prompt is empty"),
            ({"input_ids": torch.tensor([[0, 0], [5, 6]])}, "prompt 0 of 2: the prompt is empty"),
            ({"input_ids": IDS, "attention_mask": MASK.tolist()}, "attention_mask is a list"),
            ({"input_ids": IDS, "attention_mask": MASK[:, :4]}, r"attention_mask is of shape \(1, 4\)"),
        ]:
            with pytest.raises(ValueError, match=sentence):
                decoder.generate(**arguments)


# None.


def test_none_in_a_call_unsets_what_the_checkpoint_sets() -> None:
    """Guards against a None without effect: a text would still end at the checkpoint's stop token."""
    call = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": LENGTH}
    with configured(pad_token_id=0, eos_token_id=STOP, repetition_penalty=1.3) as decoder:
        with pytest.raises(ValueError, match=r"repetition_penalty is 1\.3"):
            decoder.generate(**call)
        call["repetition_penalty"] = None
        assert decoder.generate(**call).shape == (1, 14 + 6)
        # None has no effect in a configuration.
        said = GenerationConfig(eos_token_id=None, max_new_tokens=LENGTH)
        assert decoder.generate(**call, generation_config=said).shape == (1, 14 + 6)
        whole = decoder.generate(**call, eos_token_id=None)
        assert torch.equal(whole, theirs(**call, eos_token_id=None))
        assert whole[0, 14:].tolist() == WHOLE


@pytest.mark.parametrize(
    "checkpoint", [{}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.3, "top_k": 7}, {"do_sample": True}], ids=str
)
@pytest.mark.parametrize(
    "call",
    [{}, {"top_k": None}, {"top_k": 0}, {"top_p": None}, {"temperature": None}, {"temperature": None, "top_k": 3}],
    ids=str,
)
def test_tokens_are_drawn_from_transformers_distribution(checkpoint: dict[str, Any], call: dict[str, Any]) -> None:
    """Guards against a checkpoint's value, or a default, that stays in force despite a None."""
    with configured(pad_token_id=0, **checkpoint) as decoder:
        ours, expected = distributions(decoder, {"max_new_tokens": 2, "do_sample": True} | call)
    torch.testing.assert_close(ours.cpu(), expected.cpu())


def distributions(decoder: SpecDecoder, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distributions of the first token, by this package and by transformers."""
    sampled: list[Sampling] = []
    drawn: list[torch.Tensor] = []
    draw = torch.multinomial
    with pytest.MonkeyPatch.context() as patch:

        def spied(target: LM, prompts: Any, sampling: Sampling, **others: Any) -> list[Generation]:
            sampled.append(sampling)
            return generate_batch(target, prompts, sampling=sampling, **others)

        patch.setattr("specdecode.decoding.specdecoder.generate_batch", spied)
        decoder.generate(IDS, attention_mask=MASK, **call)
        patch.setattr(torch, "multinomial", lambda probs, **others: [drawn.append(probs), draw(probs, **others)][1])
        theirs(IDS, attention_mask=MASK, **call)
    return sampled[0].probs(logits(MODEL, prompt())[-1:].float()), drawn[0]


# Padding.


def test_padding_is_inferred_as_transformers_infers_it() -> None:
    """Guards against padding that is silently read as text where no mask is given."""
    short = [7, 44, 12]
    ids = torch.tensor([prompt(), [0] * 11 + short])
    for settings in ({"pad_token_id": 0}, {"pad_token_id": 0, "eos_token_id": [STOP, 0]}, {"eos_token_id": 0}, {}):
        with configured(max_new_tokens=LENGTH, **settings) as decoder:
            assert torch.equal(decoder.generate(ids), theirs(ids))
    with configured(max_new_tokens=LENGTH, pad_token_id=0) as decoder:
        alone = decoder.generate(torch.tensor([short]))
        assert decoder.generate(ids)[1, 14:].tolist() == alone[0, 3:].tolist()
        inner = torch.tensor([[5, 0, 17, 33]])
        with pytest.raises(ValueError, match=r"input_ids has pad_token_id 0 behind other tokens.*attention_mask"):
            decoder.generate(inner)
        whole = torch.ones_like(inner)
        assert torch.equal(decoder.generate(inner, attention_mask=whole), theirs(inner, attention_mask=whole))


def test_several_sequences_and_stop_strings_need_a_stop_token() -> None:
    """Guards against padding where transformers, without a stop token, continues the text."""
    ids = torch.tensor([prompt(), prompt()[::-1]])
    settings = {
        "max_new_tokens": LENGTH,
        "stop_strings": TARGET.decode(WHOLE[:2]),
        "attention_mask": torch.ones_like(ids),
    }
    with configured(pad_token_id=0) as decoder:
        with pytest.raises(ValueError, match="stop_strings of several sequences need an eos_token_id"):
            decoder.generate(ids, **settings)
        assert torch.equal(decoder.generate(ids, eos_token_id=1, **settings), theirs(ids, eos_token_id=1, **settings))


def test_stop_strings_are_read_with_the_tokenizer_of_the_target() -> None:
    """Guards against a tokenizer that is passed and not used."""
    with configured(pad_token_id=0) as decoder:
        call = {"max_new_tokens": 3, "stop_strings": TARGET.decode(WHOLE[1:2])}
        stopped = decoder.generate(IDS, tokenizer=characters(), **call)
        assert torch.equal(stopped, theirs(IDS, **call))
        assert stopped[0, 14:].tolist() == WHOLE[:2]
        with pytest.raises(ValueError, match="tokenizer is not that of llama, which is used for stop_strings here"):
            decoder.generate(IDS, tokenizer=characters(["\0", "e"]), **call)


# Streams.


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10_000},
        {"input_ids": None},
        {"stop_strings": ["", "a"]},
    ],
    ids=str,
)
def test_a_refused_call_ends_its_stream(settings: dict[str, Any]) -> None:
    """Guards against a reader, in a thread of its own, that waits for ever for the text of a refused call."""
    streamer = TextIteratorStreamer(TARGET.tokenizer, timeout=20)
    with configured(pad_token_id=0) as decoder, pytest.raises(ValueError, match=r"\w"):
        decoder.generate(**{"input_ids": IDS, "attention_mask": MASK} | settings, streamer=streamer)
    assert "".join(streamer) == ""


class Broken(TextIteratorStreamer):
    """A streamer that fails at its third value."""

    puts = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 3:
            raise OSError("the pipe is closed")
        super().put(value)


def test_a_stream_ends_when_decoding_fails() -> None:
    """Guards against a reader that waits for ever when decoding fails in the middle of a text, or that loses the text
    before.
    """
    streamer = Broken(TARGET.tokenizer, timeout=20)
    with configured(pad_token_id=0) as decoder, pytest.raises(OSError, match="the pipe is closed"):
        decoder.generate(IDS, attention_mask=MASK, max_new_tokens=LENGTH, streamer=streamer)
    text = "".join(streamer)
    assert TARGET.decode([*prompt(), *WHOLE]).startswith(text)
    assert len(text) > IDS.shape[1]


# Fuzzing.

TENSOR = torch.tensor([[1, 2]])
# For each setting: values that both transformers and this package accept, and other values.
HONOURED: dict[str, tuple[list[Any], list[Any]]] = {
    "max_new_tokens": ([None, 1, 5, 9, np.int64(4), torch.tensor(6)], [2.5, "3", 0, -1, TENSOR, 10_000]),
    "max_length": ([None, 17, 22, np.int64(20), torch.tensor(18)], [3, 19.5, "20", TENSOR]),
    "do_sample": ([None, False, 0, np.False_], [TENSOR]),
    "temperature": ([None, 1.0, 0.7, 0.0], ["a", TENSOR]),
    "top_k": ([None, 0, 1, 5, 1000], [2.5, TENSOR]),
    "top_p": ([None, 1.0, 0.5], ["a", TENSOR]),
    "eos_token_id": (
        [
            None,
            STOP,
            WHOLE[2],
            [3, STOP],
            (WHOLE[7],),
            torch.tensor([WHOLE[3], 5]),
            np.int64(STOP),
            np.array([STOP, 0]),
            -1,
        ],
        ["2", 2.5, [2.5], [], TENSOR, 10**6],
    ),
    "pad_token_id": ([None, 0, 9, STOP, np.int64(9), torch.tensor(7)], ["0", 1.5, [0], TENSOR]),
    "stop_strings": (
        [None, TARGET.decode(WHOLE[4:6]), [TARGET.decode(WHOLE[6:7]), "zq"], ("e", "a")],
        [[], "", [""], [1], 5, False, TENSOR],
    ),
    "num_return_sequences": ([None, 1], [0, 2, 1.5, TENSOR]),
}
OTHERS: dict[str, list[Any]] = {
    "assistant_early_exit": [2],
    "bad_words_ids": [[[WHOLE[0]]], []],
    "begin_suppress_tokens": [[WHOLE[0]], []],
    "bos_token_id": [0, 7],
    "cache_implementation": ["static", "dynamic", "hybrid"],
    "constraints": [[]],
    "diversity_penalty": [0.0],
    "early_stopping": [True, False],
    "encoder_no_repeat_ngram_size": [0],
    "encoder_repetition_penalty": [1.0],
    "epsilon_cutoff": [0.0, 0.1],
    "eta_cutoff": [0.0, 0.1],
    "exponential_decay_length_penalty": [(2, 1.5)],
    "forced_bos_token_id": [0, 5],
    "forced_eos_token_id": [0, 5],
    "guidance_scale": [1.0, 1.5, 0],
    "inputs_embeds": [torch.zeros(1, 2, 32, dtype=torch.float64)],
    "length_penalty": [2.0],
    "logits_processor": [LogitsProcessorList()],
    "max_time": [0, 0.0, 100.0],
    "min_length": [0, 16, 40],
    "min_new_tokens": [0, 3, 8],
    "min_p": [0.0, 0.3],
    "negative_prompt_ids": [TENSOR],
    "no_repeat_ngram_size": [0, 1, 2],
    "no_such_setting": [0, 1, None],
    "num_beams": [1, 2],
    "output_attentions": [False, True],
    "output_scores": [False, True],
    "penalty_alpha": [0.0, 0.6],
    "position_ids": [TENSOR],
    "prefix_allowed_tokens_fn": [lambda row, text: [5]],
    "prompt_lookup_num_tokens": [3],
    "remove_invalid_values": [False, True],
    "renormalize_logits": [False, True],
    "repetition_penalty": [1.0, 1.3, None],
    "return_dict_in_generate": [False, True],
    "sequence_bias": [{(WHOLE[0],): -50.0}],
    "stopping_criteria": [StoppingCriteriaList()],
    "suppress_tokens": [[], [WHOLE[1]]],
    "token_healing": [False],
    "token_type_ids": [TENSOR],
    "typical_p": [1.0, 0.9],
    "use_cache": [True, False, None],
    "watermarking_config": [None, {}],
}
# Values that a checkpoint's JSON file may hold.
PLAIN = (int, float, str, bool, type(None))


@st.composite
def called(draw: st.DrawFn) -> tuple[bool, dict[str, Any], dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """Draw a call: whether every value is an accepted one, the checkpoint's settings, the call's settings, those of its
    configuration if it has one, and its inputs.
    """
    taken = draw(st.booleans())

    def some(most: int, plain: bool) -> dict[str, Any]:
        names = sorted(HONOURED) if taken else sorted(HONOURED) + sorted(OTHERS)
        chosen = {}
        for name in draw(st.lists(st.sampled_from(names), max_size=most, unique=True)):
            values = HONOURED[name][0] + ([] if taken else HONOURED[name][1]) if name in HONOURED else OTHERS[name]
            fitting = [v for v in values if not plain or isinstance(v, PLAIN)]
            if fitting and not (plain and name in ("stopping_criteria", "logits_processor")):
                chosen[name] = draw(st.sampled_from(fitting))
        return chosen

    rows = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    width = max(rows)
    pad = draw(st.sampled_from([0, 9]))
    ids = torch.tensor([[pad] * (width - n) + [(t + 7 * i) % 90 + 1 for t in prompt(n)] for i, n in enumerate(rows)])
    inputs: dict[str, Any] = {draw(st.sampled_from(["input_ids", "inputs"])): ids}
    if draw(st.booleans()):
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in rows])
        inputs["attention_mask"] = mask.to(draw(st.sampled_from([torch.long, torch.bool, torch.float32])))
    configuration = draw(st.none() | st.just(True))
    return taken, some(3, True), some(5, False), None if configuration is None else some(3, True), inputs


def answer_or_error(**settings: Any) -> torch.Tensor | Exception:
    """Return the output of transformers, or its error: its own code may fail at any value."""
    try:
        return theirs(**settings)
    except Exception as error:
        return error


@fuzzed(20)
@given(called())
def test_any_call_is_answered_as_there_or_refused_by_name(case: Any) -> None:
    """Guards against a setting that is dropped, misread, or refused without its name."""
    taken, checkpoint, call, configuration, inputs = case
    call = dict(call)
    try:
        own = GenerationConfig(**checkpoint)
        if configuration is not None:
            call["generation_config"] = GenerationConfig(**configuration)
    except (ValueError, TypeError):
        return  # transformers rejects the file
    usual, MODEL.generation_config = MODEL.generation_config, own
    ours: Any
    expected: Any = None
    try:
        try:
            ours = SpecDecoder(TARGET, PromptLookup).generate(**inputs, **call)
        except ValueError as error:
            ours = str(error)
        # Don't run a refusable call in transformers: it may ask for ten thousand tokens.
        if taken or not isinstance(ours, str):
            expected = answer_or_error(**inputs, **call)
    finally:
        MODEL.generation_config = usual
    if isinstance(ours, str):
        others = ("input_ids", "max_length", "stop string", "prompt")
        assert any(name in ours for name in (*checkpoint, *call, *(configuration or ()), *inputs, *others)), ours
        assert not taken or isinstance(expected, Exception) or known_refusal(ours), ours
    elif isinstance(expected, torch.Tensor):
        assert ours.tolist() == expected.tolist()
    else:
        assert not isinstance(expected, ValueError) or known_answer(str(expected)), expected


def known_refusal(sentence: str) -> bool:
    """Return whether this is a known refusal of a call that transformers answers."""
    return any(
        part in sentence
        for part in ("stop_strings of several sequences", "padding must be on the left", "the prompt is empty")
    )


def known_answer(sentence: str) -> bool:
    """Return whether this is a known call that transformers refuses and this package answers."""
    return False
