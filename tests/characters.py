"""A tiny model with a tokenizer of single characters, saved as a folder: for what takes a model by name and text."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import ARCHITECTURES, build

CHARACTERS = ["\0", *sorted(set(string.printable) - set("\r\t\x0b\x0c"))]


def save(folder: Path, name: str = "llama", characters: list[str] = CHARACTERS, seed: int = 2) -> Path:
    """Write the model and its tokenizer; prompts of a thousand characters fit its context."""
    build(ARCHITECTURES[name] | {"max_position_embeddings": 2048, "eos_token_id": None}, seed).save_pretrained(folder)
    fast = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token=characters[0]))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token=characters[0]).save_pretrained(folder)
    return folder
