"""Prompts as token ids: of texts, of chats, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BYTES = 256


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Make token ids of texts, with or without a tokenizer.

    Attributes:
        name: of the model, for messages.
        tokenizer: of the model; None if it has none.
        vocab_size: of the model, in tokens.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    vocab_size: int = _BYTES

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Return the token ids of a text. Without a tokenizer these are its bytes: models of random weights take any
        ids.

        Args:
            text: anything.
            chat: treat the text as a user's message, in the model's chat template up to the beginning of the answer.

        Raises:
            ValueError: a chat with a model that has no template for one.
        """
        if chat:
            if self.tokenizer is None or not self.tokenizer.chat_template:
                raise ValueError(f"{self.name} has no chat template: give it a text to continue, without chat")
            return chat_ids(self.tokenizer, text)
        if self.tokenizer is None:
            return [byte % self.vocab_size for byte in text.encode()]
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids


@dataclass(frozen=True, slots=True)
class Codec:
    """Make text of token ids and token ids of text, as a server does that takes and sends text.

    Attributes:
        tokenizer: of the model; without one, ids are bytes.
    """

    tokenizer: PreTrainedTokenizerBase | None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt. A token that the server puts before each text by itself is left out."""
        if self.tokenizer is None:
            return bytes(ids).decode(errors="replace")
        starts = bool(ids) and ids[0] == self.tokenizer.bos_token_id
        text: Any = self.tokenizer.decode(list(ids[1:] if starts else ids))
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of an output."""
        if self.tokenizer is None:
            return list(text.encode())
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Return the token ids of a user's message in the chat template, up to the beginning of the answer."""
    messages = [{"role": "user", "content": message}]
    templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template contains its special tokens.
    ids: list[int] = tokenizer(templated, add_special_tokens=False)["input_ids"]
    return ids


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return the tokens that end a text: those that the model's generation_config declares, and the tokenizer's own.

    The latter may be all that ends the turns of a chat: a model that is trained on further for chats often keeps the
    generation_config of the model that it was.
    """
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ends))
