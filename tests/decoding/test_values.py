import re
from typing import Any

import pytest
import torch

from specdecode import (
    LM,
    HeadDrafter,
    ModelDrafter,
    SpecDecoder,
    UniversalDrafter,
    generate,
    generate_batch,
    measure_costs,
)
from specdecode.controllers.base import FixedK
from specdecode.decoding.request import stops_of
from specdecode.decoding.values import prompt_ids
from specdecode.drafters.none import NoDraft
from tests.helpers.models import lm


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("2024", "the prompt is the text '2024': give its token ids, target.encode(text)"),
        (torch.ones(1, 3, dtype=torch.long), "the prompt is a tensor of shape (1, 3): give the token ids of one row"),
        ([1.5], "the prompt is [1.5]: it must be a list of token ids"),
        (7, "the prompt is 7: it must be a list of token ids"),
    ],
)
def test_a_prompt_that_is_no_row_of_token_ids_is_told(given: Any, sentence: str) -> None:
    """Guards against the digits of a text that are decoded as tokens."""
    with pytest.raises(ValueError, match=re.escape(sentence)):
        prompt_ids(given)


@pytest.mark.parametrize("given", [7, [7], torch.tensor([7]), torch.tensor(7)])
def test_stop_tokens_come_in_any_form(given: Any) -> None:
    """Guards against a tensor of stop tokens that never stops, as tensors are equal to none but themselves."""
    assert stops_of(lm("llama"), given, ()).find([1], [3, 7]) == 1
    assert stops_of(lm("llama"), None, ()).find([1], [3, 7]) is None
    assert stops_of(lm("llama"), given, None).find([1], [3, 7]) == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda target: LM("gpt2"), "the model is a str: give specdecode.load('gpt2')"),
        (lambda target: generate("gpt2", [1]), "the target is a str, and must be an LM: give specdecode.load('gpt2')"),
        (lambda target: generate(target.model, [1]), "an LM: give specdecode.LM(model, tokenizer)"),
        (lambda target: generate_batch(target.model, [[1]]), "the target is a LlamaForCausalLM"),
        (
            lambda target: generate_batch(target, [7, 9]),
            "prompt 0 of 2: the prompt is 7: it must be a list of token ids",
        ),
        (lambda target: ModelDrafter(target.model), "the draft is a LlamaForCausalLM"),
        (lambda target: generate_batch(target, [[1]], drafter=NoDraft()), "makes one for each prompt, such as"),
        (lambda target: generate_batch(target, [[1]], controller=FixedK(3)), "such as `lambda: FixedK(5)`"),
        (lambda target: generate_batch(target, [[1]], drafter=target), "such as `lambda: ModelDrafter(draft)`"),
        (
            lambda target: generate_batch(target, [[1]], policy=None),
            "policy is of type NoneType: give one",
        ),
        (lambda target: generate(target, [1], drafter=target), "give one, such as ModelDrafter(draft)"),
        (lambda target: generate(target, [1], drafter=NoDraft), "give one, such as ModelDrafter(draft)"),
        (lambda target: generate(target, [1], drafter=lambda: NoDraft()), "give one, such as ModelDrafter(draft)"),
        (lambda target: generate(target, [1], controller=5), "controller is of type int: give one, such as FixedK(5)"),
        (lambda target: generate(target, [1], policy=256), "policy is of type int: give one, such as SinkWindow"),
        (lambda target: generate(target, [1], sampling=0.7), "sampling is of type float: give one, such as Sampling("),
        (lambda target: generate(target, [1], stop=[2]), "stop has 2: give strings, and tokens as stop_token_ids"),
        (lambda target: SpecDecoder(target.model), "the target is a LlamaForCausalLM"),
        (lambda target: UniversalDrafter(target.model, target), "the target is a LlamaForCausalLM"),
        (lambda target: measure_costs("gpt2", NoDraft()), "the target is a str"),
        (lambda target: measure_costs(target, target), "give one, such as ModelDrafter(draft)"),
        (lambda target: HeadDrafter("smollm2-135m"), "the head is a str: give load_head(name, target)"),
        (lambda target: generate(target, [1], max_new_tokens=2.5), "max_new_tokens is 2.5: it must be a whole number"),
    ],
)
def test_another_thing_in_place_of_an_argument_is_told(call: Any, sentence: str) -> None:
    """Guards against an attribute error from inside the package."""
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(lm("llama"))
