"""The end of an answer."""

from __future__ import annotations

import pytest

from specdecode import LM
from tests.helpers.models import ARCHITECTURES, build
from tests.helpers.spelling import characters, pieces

END = characters().convert_tokens_to_ids("b")


@pytest.mark.parametrize(
    ("declared", "alone", "with_tokenizer"),
    [
        (None, (), (END,)),
        (7, (7,), (7, END)),
        ([7, 9], (7, 9), (7, 9, END)),
        ([END, 9], (END, 9), (END, 9)),
        (END, (END,), (END,)),
    ],
)
def test_a_text_ends_at_what_the_checkpoint_and_the_tokenizer_declare(
    declared: int | list[int] | None, alone: tuple[int, ...], with_tokenizer: tuple[int, ...]
) -> None:
    """Guards against a chat model that continues past its turn, because only its tokenizer declares the end."""
    model, tokenizer = build(ARCHITECTURES["llama"]), characters()
    model.generation_config.eos_token_id = declared
    assert LM(model).stop_token_ids == alone
    assert LM(model, tokenizer).stop_token_ids == alone  # a tokenizer without an end-of-text token
    tokenizer.eos_token = "b"
    assert LM(model, tokenizer).stop_token_ids == with_tokenizer


def test_a_chat_begins_once() -> None:
    """Guards against two start tokens, one of the template's and one of the tokenizer's."""
    tokenizer = pieces(["hello"])
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    target = LM(build(ARCHITECTURES["llama"] | {"vocab_size": len(tokenizer)}), tokenizer)
    assert target.encode("hello").count(tokenizer.bos_token_id) == 1
    chat = target.encode("hello", chat=True)
    assert chat[0] == tokenizer.bos_token_id
    assert chat.count(tokenizer.bos_token_id) == 1
