"""SpecDecoder against `model.generate` of transformers: the same call, the same output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from specdecode import (
    LM,
    Generation,
    ModelDrafter,
    PromptLookup,
    Sampling,
    SinkWindow,
    SpecDecoder,
    StaticTree,
    generate,
    generate_batch,
)
from tests.helpers.models import ARCHITECTURES, VOCABULARY, build, greedy, prompt

LENGTH = 16


@pytest.fixture(scope="module")
def target() -> LM:
    model = build(ARCHITECTURES["llama"])
    model.generation_config = GenerationConfig(pad_token_id=0)
    return LM(model, name="llama")


@pytest.fixture(scope="module")
def decoder(target: LM) -> SpecDecoder:
    draft = target.subset([0, 1, 3])
    return SpecDecoder(target, lambda: ModelDrafter(draft, StaticTree((2, 1))))


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    width = max(lengths)
    rows = [[0] * (width - n) + [(t + 7 * i) % VOCABULARY for t in prompt(n)] for i, n in enumerate(lengths)]
    masks = [[0] * (width - n) + [1] * n for n in lengths]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def calls() -> Iterator[dict[str, Any]]:
    stop = greedy("llama", LENGTH)[5]
    yield {}
    yield {"max_new_tokens": LENGTH}
    yield {"max_length": 30, "do_sample": False}
    yield {"max_new_tokens": LENGTH, "eos_token_id": stop}
    yield {"max_new_tokens": LENGTH, "eos_token_id": [stop, 3], "pad_token_id": 9}
    yield {"max_new_tokens": LENGTH, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "min_length": 0}
    yield {"generation_config": GenerationConfig(max_new_tokens=7, eos_token_id=stop, pad_token_id=1)}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")  # the first call uses it
@pytest.mark.parametrize("lengths", [(14,), (14, 3, 9)])
@pytest.mark.parametrize("settings", list(calls()), ids=lambda settings: ",".join(settings) or "defaults")
def test_the_same_call_gives_the_same_tensor(
    target: LM, decoder: SpecDecoder, lengths: tuple[int, ...], settings: dict[str, Any]
) -> None:
    """Guards against another meaning of padding, lengths or stop tokens than in transformers."""
    inputs = padded(*lengths)
    assert torch.equal(decoder.generate(**inputs, **settings), target.model.generate(**inputs, **settings))
    assert len(decoder.results) == len(lengths)
    assert any(result.accepted for result in decoder.results)


def test_the_model_s_own_settings_come_last(target: LM, decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against defaults that override the settings of a checkpoint or of the caller."""
    own = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    monkeypatch.setattr(target.model, "generation_config", own)
    inputs = padded(8)
    assert decoder.generate(**inputs).shape == (1, 13)
    assert decoder.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=3)).shape == (1, 11)
    assert decoder.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=3), max_new_tokens=2).shape == (
        1,
        10,
    )


def test_sampling_repeats_with_torch_s_seed(decoder: SpecDecoder) -> None:
    """Guards against a user's torch seed without effect, and against equal samples of one prompt."""
    settings = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "top_k": 0, "num_return_sequences": 3}

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return decoder.generate(**padded(6, 9), max_new_tokens=8, **settings)

    assert sample(1).shape == (6, 17)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert len({tuple(row.tolist()) for row in sample(1)[:3]}) == 3


def test_sampling_takes_transformers_defaults(monkeypatch: pytest.MonkeyPatch, decoder: SpecDecoder) -> None:
    """Guards against another distribution than `do_sample=True` has in transformers, where the default top_k is 50."""
    seen: list[Sampling] = []

    def spied(target: LM, prompts: list[list[int]], sampling: Sampling, **settings: Any) -> list[Generation]:
        seen.append(sampling)
        return generate_batch(target, prompts, sampling=sampling, **settings)

    monkeypatch.setattr("specdecode.decoding.specdecoder.generate_batch", spied)
    decoder.generate(**padded(4), do_sample=True)
    assert (seen[0].temperature, seen[0].top_k, seen[0].top_p) == (1.0, 50, 1.0)
    decoder.generate(**padded(4), temperature=0.3)
    assert seen[1].greedy


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_what_transformers_tells_it(target: LM, decoder: SpecDecoder) -> None:
    """Guards against a stream without the prompt, or without an end."""
    ours, theirs = Heard(), Heard()
    decoder.generate(**padded(6), max_new_tokens=9, streamer=ours)
    target.model.generate(**padded(6), max_new_tokens=9, streamer=theirs)
    assert ours.tokens == theirs.tokens
    assert ours.ended


def test_a_policy_is_that_of_generate(target: LM) -> None:
    """Guards against a policy or another part that is accepted and not passed on."""
    policy = SinkWindow(12)
    decoder = SpecDecoder(target, PromptLookup, policy=policy)
    new = decoder.generate(**padded(14), max_new_tokens=40)[0, 14:].tolist()
    assert new == generate(target, prompt(14), policy=policy, max_new_tokens=40).tokens
    assert decoder.results[0].compressions > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 4}, "num_beams is 4, which is not honoured here"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
        ({"generation_config": GenerationConfig(no_repeat_ngram_size=2)}, "no_repeat_ngram_size is 2"),
        ({"logits_processor": [print]}, "logits_processor is"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is 3"),
        ({"assistant_model": "a model"}, "assistant_model is 'a model'"),
        ({"no_such_setting": 3}, "no_such_setting is 3"),
        ({"use_cache": False}, "use_cache is False"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2: greedy decoding has one continuation"),
        ({"max_length": 6}, "max_length is 6, and the prompts have 6 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop_strings": ["a"]}, "stop strings need a tokenizer"),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_refused_by_name(decoder: SpecDecoder, settings: dict[str, Any], sentence: str) -> None:
    """Guards against an output that silently ignores a setting."""
    with pytest.raises(ValueError, match=sentence):
        decoder.generate(**padded(6), **settings)


def test_padding_on_the_right_is_refused(decoder: SpecDecoder) -> None:
    """Guards against a prompt with padding in its middle."""
    inputs = padded(6, 3)
    flipped = {name: value.flip(1) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="padding must be on the left"):
        decoder.generate(**flipped)


def test_a_streamer_of_a_batch_is_refused(decoder: SpecDecoder) -> None:
    """Guards against several texts mixed in one stream."""
    with pytest.raises(ValueError, match="a streamer writes one sequence, and 2 are asked for"):
        decoder.generate(**padded(6, 3), streamer=Heard())


def test_a_drafter_in_the_place_of_what_makes_one_is_told(target: LM, unchecked: None) -> None:
    """Guards against an obscure error, or rows that share one drafter's cache, where a drafter is passed instead of a
    factory.
    """
    with pytest.raises(ValueError, match="drafter is of type PromptLookup: give a function"):
        SpecDecoder(target, PromptLookup())  # type: ignore[arg-type]
