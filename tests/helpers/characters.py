"""A tiny model with a tokenizer of single characters, saved as a folder: for code that loads a model by its name."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.models import ARCHITECTURES, build, moved
from tests.helpers.spelling import CHARACTERS, characters


def save(
    folder: Path,
    name: str = "llama",
    texts: list[str] = CHARACTERS,
    seed: int = 2,
    context: int = 2048,
    layers: int = 4,
) -> Path:
    """Write the model and its tokenizer. Prompts of a thousand characters fit into its usual context."""
    values = ARCHITECTURES[name] | {
        "max_position_embeddings": context,
        "eos_token_id": None,
        "num_hidden_layers": layers,
    }
    moved(build(values, seed), "cpu").save_pretrained(folder)
    characters(texts).save_pretrained(folder)
    return folder
