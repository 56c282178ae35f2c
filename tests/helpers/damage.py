"""Damaged files, as a manual edit, a bug or a broken disk may leave them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import Phase
from hypothesis import strategies as st

T = TypeVar("T")

# The examples are minimal already.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)

# Values to put in place of a correct one.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(
        [10**400, -(10**400), 1e308, -1e308, 5e-324, 1e-30, math.nan, math.inf, -math.inf, 0.5, 1e15, 1e16]
    ),
    st.sampled_from(["", "no", "12", "0xZZ", "../../etc", "\ud800", "\x00", "<b>|$&", "x" * 500]),
    st.sampled_from([[], {}, [None], [-5, 3], {"0": 3}, {"x": {}}, [[[[]]]]]),
)
GONE = "(gone)"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value of a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


@dataclass(frozen=True)
class Damage:
    """A damaged file and the damage."""

    done: Any
    content: bytes = field(repr=False)


def damaged(
    document: Any, of_interest: Callable[[tuple[Any, ...]], bool] = lambda path: True
) -> st.SearchStrategy[Damage]:
    """Return a strategy of files with a JSON document in which one or two values, or a few bytes, are damaged.

    Args:
        document: the undamaged document.
        of_interest: selects the paths of the values that may be replaced or removed; by default all.
    """
    paths = sorted(filter(of_interest, places(document)), key=repr)
    edits = st.lists(st.tuples(st.sampled_from(paths), st.just(GONE) | ODD), min_size=1, max_size=2)
    text = json.dumps(document).encode()
    place = st.integers(0, len(text))
    bytes_replaced = st.tuples(place, st.integers(0, 2), st.binary(max_size=3))
    return st.one_of(
        edits.map(lambda done: Damage(done, json.dumps(edited(document, done)).encode())),
        bytes_replaced.map(lambda done: Damage(done, text[: done[0]] + done[2] + text[done[0] + done[1] :])),
        place.map(lambda end: Damage(end, text[:end])),
    )


def edited(document: Any, edits: Sequence[tuple[tuple[Any, ...], Any]]) -> Any:
    """Return a copy with some values replaced or removed. Edits of places that no longer exist are skipped."""
    changed = copy.deepcopy(document)
    for (*folders, last), value in edits:
        inner = changed
        for key in folders:
            inner = inner[key] if _has(inner, key) else None
        if not _has(inner, last):
            continue
        if value is GONE:
            del inner[last]
        else:
            inner[last] = value
    return changed


def _has(value: Any, key: Any) -> bool:
    return (isinstance(value, dict) and key in value) or (
        isinstance(value, list) and isinstance(key, int) and key < len(value)
    )


def taken(take: Callable[[], T], *begins: str) -> T | None:
    """Return the content of a file, or None if reading it raises one sentence with one of these beginnings."""
    try:
        return take()
    except ValueError as error:
        sentence = str(error)
    assert sentence.startswith(begins), sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    return None
