"""Read prompts from the command line and from files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from specdecode.support.files import read_lines


def read_prompts(file: Path) -> list[str]:
    """Return a prompt for each line that is not blank: the line itself, or in .jsonl the field `prompt` of its object.

    Raises:
        ValueError: the file is no text in UTF-8, has no prompts, or has a line without a prompt.
    """
    try:
        lines = read_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from None
    as_json = file.suffix.lower() == ".jsonl"
    # Only ASCII spaces make a line blank: a line of other spaces is a prompt.
    texts = [_prompt(line, number, file, as_json) for number, line in enumerate(lines, start=1) if line.strip(" \t\r")]
    if not texts:
        raise ValueError(f"{file} has no prompts: write one per line")
    return texts


def whole_text(argument: str, name: str) -> str:
    """Return a text of the command line, read as UTF-8 whatever the locale is.

    Args:
        argument: the text, as Python decoded it.
        name: name of the text, for the message.

    Raises:
        ValueError: the text is not in UTF-8.
    """
    if not _has_half_pairs(argument):
        return argument
    try:
        # Python decodes each byte that is no text in the locale to half a surrogate pair.
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise ValueError(f"{name} is {argument!a}, which is no text in UTF-8: correct its bytes") from None


def _prompt(line: str, number: int, file: Path, as_json: bool) -> str:
    if not as_json:
        return line
    try:
        text = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"line {number} of {file} is no JSON object with a field prompt")
    if _has_half_pairs(text):
        raise ValueError(
            f"line {number} of {file} has half a surrogate pair, which is no character: correct its \\u escapes"
        )
    return text


def _has_half_pairs(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
