from __future__ import annotations

import pytest

from specdecode import (
    LM,
    BestFirstTree,
    Cascade,
    HeadDrafter,
    ModelDrafter,
    NoDraft,
    PromptLookup,
    StaticTree,
    UniversalDrafter,
    generate,
    load,
    load_head,
)
from specdecode.bench.measure.check import classify
from specdecode.drafters.base import Drafter
from specdecode.heads.bound import BoundHead, untrained
from specdecode.heads.eagle3_files import PAGE, WEIGHTS, read_eagle3
from specdecode.heads.loading import shipped_head
from specdecode.models.embedded import EMBEDDED, EMBEDDED_DRAFT
from tests.helpers.learnt import learnt
from tests.helpers.models import continuation
from tests.helpers.spelling import byte_pairs, characters

TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is"


@pytest.fixture(scope="module")
def target() -> LM:
    return load(device="cpu")


def test_the_embedded_model_knows_something(target: LM) -> None:
    """Guards against weights dequantised in the wrong order: they load, and the text is nonsense."""
    assert target.tokenizer is not None
    text = target.tokenizer.decode(generate(target, target.encode(TEXT), max_new_tokens=4).tokens)
    assert text.startswith(" Berlin.")


@pytest.fixture(scope="module")
def draft(target: LM) -> LM:
    return load(EMBEDDED_DRAFT, target=target)


@pytest.fixture(scope="module")
def head(target: LM) -> BoundHead:
    return load_head(EMBEDDED, target)


@pytest.fixture(scope="module")
def expected(target: LM) -> list[int]:
    """Return the continuation of the text by transformers' own `generate`."""
    return continuation(target.model, target.encode(TEXT), 32)


@pytest.mark.parametrize("name", ["none", "lookup", "chain", "static", "best-first", "head", "head-tree", "cascade"])
def test_real_weights_decode_to_transformers_own_tokens(
    target: LM, draft: LM, head: BoundHead, expected: list[int], name: str
) -> None:
    """Guards against wrong tokens with a real vocabulary and drafts that are mostly right, which tiny models lack."""
    drafters: dict[str, Drafter] = {
        "none": NoDraft(),
        "lookup": PromptLookup(),
        "chain": ModelDrafter(draft),
        "static": ModelDrafter(draft, StaticTree((2, 1, 1))),
        "best-first": ModelDrafter(draft, BestFirstTree(8)),
        "head": HeadDrafter(head),
        "head-tree": HeadDrafter(head, BestFirstTree(8)),
        "cascade": Cascade(PromptLookup(min_ngram=2), HeadDrafter(head)),
    }
    prompt = target.encode(TEXT)
    result = generate(target, prompt, drafter=drafters[name], max_new_tokens=32)
    # In float32, rounding may decide a tie. Any other difference is an error.
    assert classify(target, prompt, expected, result.tokens) in ("equal", "tie")
    assert (result.accepted > 0) == (name != "none")


@pytest.mark.parametrize("spelling", ["characters", "byte-pairs"])
def test_a_draft_of_another_vocabulary_finds_the_real_tokens(target: LM, expected: list[int], spelling: str) -> None:
    """Guards against a translation that is right only for small vocabularies. The draft knows the coming text, so each
    rejected token was translated differently from the target's text.
    """
    assert target.tokenizer is not None
    prompt = target.encode(TEXT)
    text = target.tokenizer.decode([*prompt, *expected])
    draft = learnt(characters() if spelling == "characters" else byte_pairs(text), text)
    result = generate(target, prompt, drafter=UniversalDrafter(target, draft), max_new_tokens=32)
    assert classify(target, prompt, expected, result.tokens) in ("equal", "tie")
    assert result.acceptance_rate > 0.7


def test_a_trained_head_comes_with_the_embedded_model(target: LM, head: BoundHead) -> None:
    """Guards against a package without its head, with a head of another training than its card's, or with an untrained
    one.
    """
    folder = shipped_head(EMBEDDED)
    assert folder is not None
    assert (folder / WEIGHTS).stat().st_size < 16e6
    card = read_eagle3(folder).card
    assert card is not None
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert card["target"] == EMBEDDED
    assert all(str(card[name]) in page for name in ("command", "commit", "seed"))
    assert all(f"{tau:.2f}" in page for tau in card["epochs"][-1]["acceptance"].values())
    prompt = target.encode("A list of the planets, from the nearest to the sun:", chat=True)
    trained, random = (
        generate(target, prompt, drafter=HeadDrafter(each), max_new_tokens=48)
        for each in (head, BoundHead(untrained(target), target))
    )
    assert trained.tokens == random.tokens
    assert random.accepted <= 2
    assert trained.mean_acceptance_length > 1.3
