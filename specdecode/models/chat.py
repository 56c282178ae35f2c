"""The prompt of a chat: a user's message in the model's chat template."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def chat_ids(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Return the token ids of a user's message in the chat template, up to the beginning of the answer."""
    messages = [{"role": "user", "content": message}]
    templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template contains its special tokens.
    ids: list[int] = tokenizer(templated, add_special_tokens=False)["input_ids"]
    return ids
