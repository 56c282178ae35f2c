"""Files of prompts: one prompt a line, however the lines end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdecode.cli.prompts import read_prompts
from tests.helpers.damage import taken
from tests.helpers.fuzzing import fuzzed

WHOLE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("plain.txt", b"one\ntwo\n", ["one", "two"]),
        ("no-end.txt", b"one\ntwo", ["one", "two"]),
        ("crlf.txt", b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        ("bom.txt", b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        ("feed.txt", "one\x0cmore\ntwo\x1cagain\nthree\x85x\n".encode(), ["one\x0cmore", "two\x1cagain", "three\x85x"]),
        ("separator.txt", "one\u2028more\n".encode(), ["one\u2028more"]),
        ("bom.jsonl", b'\xef\xbb\xbf{"prompt": "one"}\n', ["one"]),
        ("separator.jsonl", '{"prompt": "one\u2028more\u2029\x85"}\n'.encode(), ["one\u2028more\u2029\x85"]),
        ("UPPER.JSONL", b'{"prompt": "one"}\n', ["one"]),
    ],
)
def test_a_line_ends_at_a_newline_alone(tmp_path: Path, name: str, content: bytes, prompts: list[str]) -> None:
    """Guards against a prompt that is cut at a Unicode line separator, and a byte order mark that is read as text."""
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("utf16.txt", "one\ntwo\n".encode("utf-16"), "cannot be read as text"),
        ("null.jsonl", b'{"prompt": null}\n', "line 1 of .* is no JSON object with a field prompt"),
        ("half.jsonl", b'{"prompt": "fine"}\n{"prompt": "a\\ud800b"}\n', "line 2 of .* has half a surrogate pair"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", "line 1 of .* is no JSON object"),
        ("blank.txt", b"\n \t\r\n", "has no prompts"),
    ],
)
def test_what_is_no_prompt_is_told_with_its_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    """Guards against a traceback from inside a tokenizer."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_prompts(tmp_path / name)


@fuzzed(40)
@given(prompts=st.lists(WHOLE, min_size=1), ascii_only=st.booleans())
def test_what_json_holds_reads_back(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], ascii_only: bool
) -> None:
    """Guards against JSON lines, our own or others', that are read differently from how they were written."""
    file = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=ascii_only) for prompt in prompts]
    file.write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert read_prompts(file) == prompts


# Separators, marks and escapes anywhere, and any other text.
TRICKY = st.sampled_from(
    [*'a {}[]":,\\\t\r\n\x00\x0b\x0c\x1c\x1e\x85\u2028\u2029\ufeff\ud800', "\\ud83d", "\r\n", '{"prompt":"a']
)
PIECES = st.lists(TRICKY | st.text(max_size=2) | st.just('{"prompt": "b"}\n'), max_size=12).map("".join)
CONTENTS = PIECES.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=40)


@fuzzed(100)
@given(content=CONTENTS, name=st.sampled_from(["prompts.txt", "prompts.jsonl", "PROMPTS.JSONL", "prompts"]))
def test_any_file_is_read_line_by_line_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    """Guards against a traceback, a line that is skipped, and a prompt that no tokenizer accepts."""
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(content)
    prompts = taken(lambda: read_prompts(file), f"{file} ", "line ")
    if prompts is None:
        return
    lines = [line for line in re.split("\r?\n|\r\\Z", content.decode().removeprefix("\ufeff")) if line.strip(" \t\r")]
    assert prompts == ([json.loads(line)["prompt"] for line in lines] if "json" in name.lower() else lines)
    assert all(isinstance(prompt, str) and prompt.encode() is not None for prompt in prompts)
