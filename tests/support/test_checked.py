"""Values of files that may be damaged: taken as they are, or refused with their name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdecode.bench.gate.history import History
from specdecode.bench.gate.verdicts import judge
from specdecode.bench.quality import quality_page, quality_tables
from specdecode.bench.report.advice import as_json
from specdecode.bench.report.html import section
from specdecode.bench.report.latex import latex
from specdecode.bench.report.markdown import markdown
from specdecode.bench.report.recommend import recommend
from specdecode.bench.runs import file as run_file
from specdecode.evals import results
from specdecode.evals.margins import check_margins, read_margins
from specdecode.support.checked import count, flag, mapping, number, parse_json
from tests.helpers.damage import NO_SHRINKING, Damage, damaged, taken
from tests.helpers.fuzzing import fuzzed
from tests.helpers.root import ROOT

DATA = ROOT / "tests" / "data"
RUN = json.loads((DATA / "run.json").read_text())
WHOLE = run_file.read(DATA / "run.json")
QUALITY = json.loads((DATA / "quality-run.json").read_text())
(MARGINS_FILE,) = (ROOT / "baselines" / "quality").glob("*.json")
MARGINS = json.loads(MARGINS_FILE.read_text())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "damaged.json"


def judged(path: tuple[Any, ...]) -> bool:
    """Whether the package reads a value: pytest-benchmark's own are not ours."""
    return path[0] != "benchmarks"


@fuzzed(20, phases=NO_SHRINKING)
@given(file=damaged(RUN, judged), is_new=st.booleans())
def test_a_damaged_run_is_refused_or_judged(path: Path, file: Damage, is_new: bool) -> None:
    """Guards against a traceback, and against figures that are not finite, wherever a file is damaged."""
    path.write_bytes(file.content)
    run = taken(lambda: run_file.read(path), f"{path} ")
    if run is None:
        return
    verdicts = judge(run, WHOLE) if is_new else judge(WHOLE, run)
    assert all(verdict.change is None or math.isfinite(verdict.change.value) for verdict in verdicts)
    past = History([], "No history.")
    for form in (markdown, latex):
        page = form(run, "title", "judged by", verdicts, past)
        assert "nan" not in page.replace("nano", "")
    assert section(run, "title", "judged by", verdicts, past)
    if advice := taken(lambda: recommend(run), f"{path} "):
        json.dumps(as_json(run, advice), allow_nan=False)


@fuzzed(20, phases=NO_SHRINKING)
@given(file=damaged(QUALITY))
def test_a_damaged_run_of_quality_is_refused_or_judged(path: Path, file: Damage) -> None:
    """Guards against the same in runs of the quality suite."""
    path.write_bytes(file.content)
    run = taken(lambda: results.read(path), f"{path} ")
    if run is None:
        return
    checks = check_margins(run, {arm: {"nll": 0.1, "kl": 0.1} for arm in QUALITY["quality"]["arms"]})
    for form in (quality_tables.markdown, quality_tables.latex):
        assert "nan" not in form(run, checks)
    assert quality_page.section(run, checks, None)


@fuzzed(20, phases=NO_SHRINKING)
@given(file=damaged(MARGINS))
def test_damaged_margins_are_refused_or_taken(path: Path, file: Damage) -> None:
    """Guards against a margin that nothing can miss."""
    path.write_bytes(file.content)
    margins = taken(lambda: read_margins(path), f"{path} ")
    if margins is not None:
        check_margins(results.read(DATA / "quality-run.json"), margins)


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
