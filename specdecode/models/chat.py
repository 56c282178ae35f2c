"""Prompts of texts and chats as token ids, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BYTES = 256


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A converter from texts to token ids, with or without a tokenizer.

    Attributes:
        name: name of the model, for messages.
        tokenizer: the model's tokenizer; None if it has none.
        vocab_size: size of the model's vocabulary, in tokens.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    vocab_size: int = _BYTES

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Return the token ids of a text. Without a tokenizer these are the text's bytes in UTF-8, modulo the
        vocabulary size: models with random weights accept any ids.

        Args:
            text: the text to encode.
            chat: whether the text is a user's message. Then it is put into the model's chat template, up to the
                beginning of the answer.

        Raises:
            ValueError: `chat` is set, but the model has no chat template.
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
    """A converter between token ids and the text that a server receives and sends.

    Attributes:
        tokenizer: the model's tokenizer; None if ids are bytes.
    """

    tokenizer: PreTrainedTokenizerBase | None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt, without the opening token that the server adds to each text itself."""
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
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return the tokens that end a text, of the model's generation_config and of the tokenizer.

    The tokenizer's token may be the only one that ends a turn of a chat: a model that is fine-tuned for chats often
    keeps the generation_config of its base model.
    """
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ends))
