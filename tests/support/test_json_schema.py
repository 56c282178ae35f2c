"""Schemas of dataclasses: their types, docstrings and forms."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from specdecode.support.files import SLUG, slug
from specdecode.support.json_schema import Definitions, Form, title


@dataclass
class Inner:
    """Inside.

    Attributes:
        size: bytes of it,
            over two lines.
    """

    size: float = field(metadata={"least": 2})


@dataclass
class Outer(Inner):
    """Outside, told
    in two lines.

    Attributes:
        inner: what is inside.
        one, other: ends of an interval.
        by_length: insides, by length.
        anything: of any kind.
    """

    inner: Inner
    one: int | None
    other: int | None = None
    by_length: dict[int, Inner] = field(default_factory=dict)
    anything: list[Any] = field(default_factory=list)


def test_fields_and_docstrings_become_a_schema() -> None:
    """Guards against keys that lose their type, description or bounds."""
    definitions = Definitions({Outer: Form(keys={"inner": "content"}, nullable=("one",), bounds={"one": (1, 5)})})
    schema = definitions.object(Outer)
    assert schema["description"] == "Outside, told in two lines."
    assert schema["required"] == ["size", "content", "one"]
    size = {"title": "Size", "description": "Bytes of it, over two lines.", "type": "number"}
    assert schema["properties"]["size"] == size | {"minimum": 2, "maximum": 1e15}
    assert schema["properties"]["content"]["$ref"] == "#/$defs/Inner"
    assert schema["properties"]["one"]["anyOf"] == [{"type": "integer", "minimum": 1, "maximum": 5}, {"type": "null"}]
    assert schema["properties"]["other"]["type"] == "integer"
    assert schema["properties"]["by_length"]["additionalProperties"] == {"$ref": "#/$defs/Inner"}
    assert schema["properties"]["anything"]["items"] == {}
    assert definitions.schemas.keys() == {"Inner"}


def test_nested_fields_may_lie_flat() -> None:
    """Guards against keys in another place than in the file."""
    schema = Definitions({Outer: Form(flat=True)}).object(Outer)
    assert list(schema["properties"]) == ["size", "one", "other", "by_length", "anything"]
    assert schema["required"] == ["size"]  # unknown values are left out of the file


def test_a_field_without_a_meaning_has_no_schema() -> None:
    """Guards against a key that is added to a file without a description."""

    @dataclass
    class Untold:
        """No more than this."""

        size: int

    with pytest.raises(KeyError, match="size"):
        Definitions().object(Untold)


def test_titles_are_words() -> None:
    """Guards against titles that only repeat the key."""
    assert title("peak_cache_bytes") == "Peak cache bytes"
    assert title("ArmRecord") == "Arm record"


@given(st.text(alphabet="ab9.-_ A\n", max_size=6))
@example("intel-r-xeon-r-processor-2-threads")
@example("quick.tiny")
def test_the_pattern_is_that_of_slugs(text: str) -> None:
    """Guards against names that the schema accepts and the reader refuses."""
    assert (re.fullmatch(SLUG, text) is not None) == (slug(text) == text)
