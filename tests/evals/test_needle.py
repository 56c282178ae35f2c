from __future__ import annotations

import pytest

from specdecode import LM, KeepAll, NoDraft, generate
from specdecode.evals.needle import Needle, bury, look_for
from specdecode.evals.perplexity import DecodePath
from specdecode.policies.base import CachePolicy
from specdecode.policies.sink_window import SinkWindow
from tests.helpers.learnt import learnt
from tests.helpers.models import lm
from tests.helpers.spelling import characters

HAY = [" ".join(f"This is sentence {i} of text {text}." for i in range(20)) for text in "AB"]


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_needle_lies_where_it_is_said_to_lie(depth: float) -> None:
    """Guards against a heat map with wrong axes: a number that stands twice, not at all, or at another depth or
    length.
    """
    target = lm("llama")
    needle = bury(target, HAY, 400, depth)
    text, number = target.decode(needle.prompt), target.decode(needle.answer).strip()
    assert len(number) == 5
    assert text.count(number) == 2
    assert text.endswith("The pass key is")
    before, _, after = text.partition("The pass key is " + number)
    after = after.partition("is the pass key. ")[2].removesuffix("What is the pass key? The pass key is")
    assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.08)
    assert 400 - 40 < len(needle.prompt) + len(needle.answer) <= 400


def test_needles_differ_by_cell_and_nothing_else() -> None:
    """Guards against one number for all needles, which a model could guess everywhere, and against runs that do not
    repeat.
    """
    target = lm("llama")
    cells = [(300, 0.0), (300, 0.5), (200, 0.0)]
    needles = [bury(target, HAY, *cell) for cell in cells]
    assert len({tuple(needle.answer) for needle in needles}) == len(cells)
    assert [bury(target, HAY, *cell) for cell in cells] == needles


def test_a_text_that_begins_with_a_long_sentence_has_room_too() -> None:
    """Guards against a length that is refused, because the sentence at a random place is too long for it."""
    target, long = lm("llama"), "This sentence goes on and on" + ", and on" * 30 + "."
    texts = [" ".join([long, "This one is short."] * 20)]
    for depth in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        text = target.decode(bury(target, texts, 200, depth).prompt)
        assert "This one is short." in text
        assert long not in text


@pytest.mark.parametrize("policy", [KeepAll(), SinkWindow(64)], ids=["full", "sink-window"])
def test_what_is_found_is_what_decoding_writes(policy: CachePolicy) -> None:
    """Guards against an answer that is scored one place off, or with a cache that holds more than in decoding."""
    target = lm("llama")
    buried = bury(target, HAY, 300, 0.5)
    path = DecodePath(target, policy)
    missed = look_for(path, buried)
    written = generate(target, buried.prompt, policy=policy, max_new_tokens=len(buried.answer), logprobs=True)
    assert written.tokens != buried.answer
    assert not missed.exact
    assert max(missed.ranks) > 0
    found = look_for(path, Needle(300, 0.5, buried.prompt, written.tokens))
    assert found.exact
    assert found.ranks == [0] * len(written.tokens)
    assert found.logprob == pytest.approx(sum(written.logprobs or []))
    assert found.logprob > missed.logprob


def test_a_model_that_knows_the_answer_finds_it() -> None:
    """Guards against an answer that no model can give, because its tokens differ from the text's own continuation."""
    tokenizer = characters()
    buried = bury(LM(lm("llama").model, tokenizer), HAY, 200, 0.5)
    text = tokenizer.decode([*buried.prompt, *buried.answer])
    found = look_for(DecodePath(learnt(tokenizer, text), drafter=lambda _: NoDraft()), buried)
    assert found.exact


@pytest.mark.parametrize(
    ("length", "depth", "reason"),
    [(300, 1.5, "depth is 1.5"), (60, 0.5, "put into 60 tokens"), (5000, 0.5, "put into 5000 tokens")],
)
def test_what_cannot_be_buried_is_told(length: int, depth: float, reason: str) -> None:
    """Guards against a needle without hay, and hay that is shorter than stated."""
    with pytest.raises(ValueError, match=reason):
        bury(lm("llama"), HAY, length, depth)
