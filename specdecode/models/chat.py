"""Where an answer begins and ends: the prompt of a chat, and the tokens that end a text."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
