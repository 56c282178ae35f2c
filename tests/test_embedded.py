from __future__ import annotations

import pytest

from specdecode import (
    LM,
    BestFirstTree,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    StaticTree,
    UniversalDrafter,
    generate,
    load,
)
from specdecode.bench.measure import classify
from specdecode.drafters.base import Drafter
from specdecode.loading import EMBEDDED_DRAFT
from tests.learnt import learnt
from tests.models import continuation
from tests.spelling import byte_pairs, characters

TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is"


@pytest.fixture(scope="module")
def target() -> LM:
    return load(device="cpu")


def test_the_embedded_model_knows_something(target: LM) -> None:
    """Guards against weights that were dequantised in another order: they load, and say nothing."""
    assert target.tokenizer is not None
    text = target.tokenizer.decode(generate(target, target.encode(TEXT), max_new_tokens=4).tokens)
    assert text.startswith(" Berlin.")


@pytest.mark.parametrize("name", ["none", "lookup", "chain", "static", "best-first"])
def test_real_weights_decode_to_transformers_own_tokens(target: LM, name: str) -> None:
    """Guards against what tiny models do not have: a real vocabulary, and drafts that are mostly right."""
    draft = load(EMBEDDED_DRAFT, target=target)
    drafters: dict[str, Drafter] = {
        "none": NoDraft(),
        "lookup": PromptLookup(),
        "chain": ModelDrafter(draft),
        "static": ModelDrafter(draft, StaticTree((2, 1, 1))),
        "best-first": ModelDrafter(draft, BestFirstTree(8)),
    }
    prompt = target.encode(TEXT)
    result = generate(target, prompt, drafter=drafters[name], max_new_tokens=32)
    expected = continuation(target.model, prompt, 32)
    # In float32 a tie is decided by rounding, which is not an error; anything else is.
    assert classify(target, prompt, expected, result.tokens) in ("equal", "tie")
    assert (result.accepted > 0) == (name != "none")


@pytest.mark.parametrize("spelling", ["characters", "byte-pairs"])
def test_a_draft_of_another_vocabulary_finds_the_real_tokens(target: LM, spelling: str) -> None:
    """Guards against a translation that is right for small vocabularies alone: the draft knows the text that will be
    written, so what is rejected was translated otherwise than the target writes."""
    assert target.tokenizer is not None
    prompt = target.encode(TEXT)
    expected = continuation(target.model, prompt, 32)
    text = target.tokenizer.decode([*prompt, *expected])
    draft = learnt(characters() if spelling == "characters" else byte_pairs(text), text)
    result = generate(target, prompt, drafter=UniversalDrafter(target, draft), max_new_tokens=32)
    assert classify(target, prompt, expected, result.tokens) in ("equal", "tie")
    assert result.acceptance_rate > 0.7
