"""The text of single tokens, against the tokenizers' own decoding of whole texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from specdecode.models.spelling import Spelling
from tests.helpers.fuzzing import fuzzed
from tests.helpers.spelling import byte_pairs, characters, pieces, words

TEXT = "It is so: 日本語。\n\nThe end, é👋🏽, isn't it?"
TOKENIZERS = {
    "byte-level": byte_pairs(TEXT, 300, {"eos_token": "</s>"}),
    "byte-fallback": pieces(["It", "is", "end"]),
    "SentencePiece": words(["It", "▁is", "▁so", ":", "▁", "日本", "語", "。", "é"]),
    "characters": characters(),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@fuzzed(40)
@given(text=st.text(st.sampled_from(TEXT + " ."), max_size=30))
def test_the_parts_of_a_text_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Guards against half characters, and spaces that are lost or inserted."""
    tokens = tokenizer("so" + text, add_special_tokens=False)["input_ids"]
    assert Spelling(tokenizer).text(tokens).removeprefix(" ") == tokenizer.decode(tokens)


@fuzzed(40)
@given(tokens=st.lists(st.integers(0, len(TOKENIZERS["byte-level"]) - 1), max_size=20))
def test_broken_characters_are_replaced_as_by_the_tokenizer(tokens: list[int]) -> None:
    """Guards against another text than the tokenizer's own, except for a character that is only begun."""
    text, decoded = Spelling(TOKENIZERS["byte-level"]).text(tokens), TOKENIZERS["byte-level"].decode(tokens)
    assert decoded in (text, text + "\N{REPLACEMENT CHARACTER}")


def test_bytes_of_half_a_surrogate_pair_begin_no_character() -> None:
    """Guards against bytes at the end of a text that are left out to wait for a character which can never be
    completed.
    """
    tokenizer = TOKENIZERS["byte-level"]
    tokens = [tokenizer.convert_tokens_to_ids(name) for name in "íłĢ"]  # the bytes ED, A0 and 80
    assert Spelling(tokenizer).text(tokens[:1]) == ""
    for count in (2, 3):
        assert Spelling(tokenizer).text(tokens[:count]) == "\N{REPLACEMENT CHARACTER}" * count
        assert tokenizer.decode(tokens[:count]) == "\N{REPLACEMENT CHARACTER}" * count


def test_a_character_stands_with_the_token_that_completes_it() -> None:
    """Guards against replacement characters for a character whose last bytes are still to come."""
    for name in ("byte-level", "byte-fallback"):
        tokenizer = TOKENIZERS[name]
        tokens = tokenizer("a👋", add_special_tokens=False)["input_ids"]
        read = list(Spelling(tokenizer).pieces(tokens))
        assert [piece for piece in read if piece][-2:] == ["a", "👋"]
        assert read[-1] == "👋"
        assert read.count("") >= 2


def test_the_text_of_a_cut_character_is_left_out_alone() -> None:
    """Guards against whole characters that are lost with a cut one: a decoder with byte fallback replaces all bytes in
    a row.
    """
    tokenizer = TOKENIZERS["byte-fallback"]
    tokens = tokenizer("so 日本", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens[:-1]).endswith("\N{REPLACEMENT CHARACTER}" * 5)
    assert Spelling(tokenizer).text(tokens[:-1]) == " so 日"
    broken = [*tokens[:-1], *tokenizer("e", add_special_tokens=False)["input_ids"]]
    assert Spelling(tokenizer).text(broken).startswith(" so 日\N{REPLACEMENT CHARACTER}")


def test_special_tokens_and_those_that_there_are_not() -> None:
    """Guards against end-of-turn tokens in a text for readers, and a crash at a token that only the model's
    table has.
    """
    tokenizer = TOKENIZERS["byte-fallback"]
    spelling = Spelling(tokenizer)
    tokens = [tokenizer.bos_token_id, *tokenizer("end", add_special_tokens=False)["input_ids"], len(tokenizer) + 7]
    assert spelling.text(tokens) == "<s> end"
    assert spelling.text(tokens, special=False) == " end"
    assert spelling(len(tokenizer) + 7) is None
    assert spelling(tokenizer.bos_token_id) == b"<s>"
