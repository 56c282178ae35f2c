"""Read files of prompts."""

from __future__ import annotations

import json
from pathlib import Path


def read_prompts(file: Path) -> list[str]:
    """Return a prompt for each line: the line as it is, or in .jsonl the field `prompt` of an object."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from None
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text: object = line
        if file.suffix == ".jsonl":
            try:
                text = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                text = None
        if not isinstance(text, str):
            raise ValueError(f"line {number} of {file} is no JSON object with a field prompt")
        texts.append(text)
    if not texts:
        raise ValueError(f"{file} has no prompts: give one a line")
    return texts
