"""Values of files that may be damaged: taken as they are, or refused with their name."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import judge
from specdecode.bench.report.advice import as_json
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex
from specdecode.bench.report.markdown import markdown
from specdecode.bench.report.recommend import recommend
from specdecode.bench.runs.file import parse
from specdecode.evals.margins import check_margins
from specdecode.evals.results import read
from specdecode.support.checked import count, flag, mapping, number, parse_json
from tests.helpers.root import ROOT

T = TypeVar("T")

RUN = json.loads((ROOT / "tests" / "data" / "run.json").read_text())
QUALITY = json.loads((ROOT / "tests" / "data" / "quality-run.json").read_text())

# The examples are as small as they get.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)

# What an edit by hand, a bug or a broken disk may leave in a file.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(
        [10**400, -(10**400), 1e308, -1e308, 5e-324, 1e-30, math.nan, math.inf, -math.inf, 0.5, 1e15, 1e16]
    ),
    st.sampled_from(["", "no", "12", "0xZZ", "../../etc", "\ud800", "x" * 500]),
    st.sampled_from([[], {}, [None], [-5, 3], {"0": 3}, {"x": {}}, [[[[]]]]]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value of a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def edited(document: Any, path: tuple[Any, ...], value: Any, delete: bool) -> Any:
    """Return a copy in which one value is another, or gone."""
    changed = copy.deepcopy(document)
    *folders, last = path
    inner = changed
    for key in folders:
        inner = inner[key]
    if delete:
        del inner[last]
    else:
        inner[last] = value
    return changed


def taken(take: Callable[[], T], file: str) -> T | None:
    """Return what a file holds, or None if it is refused in one sentence that begins with its name."""
    try:
        return take()
    except ValueError as error:
        sentence = str(error)
    assert sentence.startswith(f"{file} ")
    assert "\n" not in sentence
    assert len(sentence) < len(file) + 400
    return None


RUN_PLACES = sorted(places(RUN["specdecode"]), key=repr)
QUALITY_PLACES = sorted(places(QUALITY["quality"]), key=repr)


@settings(deadline=None, max_examples=20, phases=NO_SHRINKING, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.sampled_from(RUN_PLACES), value=ODD, delete=st.booleans(), side=st.booleans())
def test_a_damaged_run_is_refused_or_judged(place: tuple[Any, ...], value: Any, delete: bool, side: bool) -> None:
    """Guards against a traceback, and against figures that are not finite, wherever a file is damaged."""
    text = json.dumps(edited(RUN, ("specdecode", *place), value, delete))
    whole = parse(json.dumps(RUN), Path("whole.json"))
    damaged = taken(lambda: parse(text, Path("damaged.json")), "damaged.json")
    if damaged is None:
        return
    verdicts = judge(damaged, whole) if side else judge(whole, damaged)
    assert all(verdict.change is None or math.isfinite(verdict.change.value) for verdict in verdicts)
    past = History([], "No history.")
    for form in (markdown, latex):
        page = form(damaged, "title", "judged by", verdicts, past)
        assert "nan" not in page.replace("nano", "")
    assert section(damaged, "title", "judged by", verdicts, past)
    json.dumps(as_json(damaged, recommend(damaged)), allow_nan=False)


@settings(deadline=None, max_examples=60, phases=NO_SHRINKING)
@given(place=st.sampled_from(QUALITY_PLACES), value=ODD, delete=st.booleans())
def test_a_damaged_run_of_quality_is_refused_or_judged(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], value: Any, delete: bool
) -> None:
    """Guards against the same in runs of the quality suite."""
    file = tmp_path_factory.getbasetemp() / "damaged.json"
    file.write_text(json.dumps(edited(QUALITY, ("quality", *place), value, delete)))
    run = taken(lambda: read(file), str(file))
    assert run is None or check_margins(run, {})


def test_values_are_taken_or_named() -> None:
    """Guards against a bound that is off, and a sentence that does not say which value it is about."""
    values = {"whole": 3, "half": 0.5, "yes": True, "long": 10**400, "word": "3"}
    assert number(values, "half") == 0.5
    assert count(values, "whole") == 3
    assert flag(values, "yes") is True
    assert flag(values, "missing", default=False) is False
    assert mapping(values, "values") is values
    for take, name, reason in (
        (number, "yes", "yes is True, which is no number"),
        (number, "word", "word is '3', which is no number"),
        (number, "long", r"long is 1000.*\.\.\., which"),
        (count, "half", "half is 0.5, which is no whole number"),
        (flag, "whole", "whole is 3, which is neither true nor false"),
    ):
        with pytest.raises(ValueError, match=reason):
            take(values, name)
    with pytest.raises(ValueError, match=r"half is 0\.5, which cannot be: it is from 1 to 1e"):
        number(values, "half", least=1)


def test_nesting_without_end_is_no_json() -> None:
    """Guards against a parser whose stack ends."""
    with pytest.raises(ValueError, match=r"deep\.json is not whole"):
        parse_json("[" * 100_000, Path("deep.json"))
