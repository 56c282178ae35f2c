"""Values of files that may be damaged: accepted, or refused with their name."""

from __future__ import annotations

import json
import math
import os
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
from specdecode.evals import results_file
from specdecode.evals.margins import check_margins, read_margins
from specdecode.support.checked import count, flag, mapping, number, parse_json, read_text
from tests.helpers.damage import GONE, NO_SHRINKING, Damage, damaged, edited, taken
from tests.helpers.fuzzing import fuzzed
from tests.helpers.root import ROOT

DATA = ROOT / "tests" / "data"
TEXT = (DATA / "run.json").read_bytes()
RUN = json.loads(TEXT)
WHOLE = run_file.read(DATA / "run.json")
QUALITY = json.loads((DATA / "quality-run.json").read_text())
(MARGINS_FILE,) = (ROOT / "baselines" / "quality").glob("*.json")
MARGINS = json.loads(MARGINS_FILE.read_text())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "damaged.json"


LOOKUP = ("specdecode", "arms", "lookup")
ROW = (*LOOKUP, "rows", next(iter(WHOLE.arms["lookup"].rows)))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ((*ROW, "log_speedup"), math.nan, "cannot be judged: log_speedup is nan, which is no number"),
        (
            (*ROW, "log_speedup"),
            math.inf,
            "cannot be judged: log_speedup is inf, which is out of range: it is from -20 to 20",
        ),
        ((*ROW, "counts", "tokens"), -5, r"tokens is -5, which is out of range: it is from 1 to 1e\+15"),
        ((*ROW, "counts", "tokens"), 1e308, r"tokens is 1e\+308, which is out of range"),
        ((*ROW, "counts", "tokens"), 10**400, r"tokens is 10000*\.\.\., which is out of range"),
        ((*ROW, "counts", "tokens"), "12", "tokens is '12', which is no number"),
        ((*ROW, "counts", "tokens"), True, "tokens is True, which is no number"),
        ((*ROW, "counts", "steps"), 0, "steps is 0, which is out of range"),
        ((*ROW, "counts", "nll"), 1e15, "nll is 10000*.0, which is out of range: it is from 0 to"),
        ((*ROW, "seconds", "total"), 5e-324, "total is 5e-324, which is out of range"),
        ((*ROW, "histograms"), None, "histograms is None, which is no object"),
        ((*ROW, "histograms", "accepted"), [-5, 3], "accepted is -5, which is out of range"),
        ((*ROW, "histograms", "accepted"), {"0": 3}, "accepted is {'0': 3}, which is no list"),
        ((*LOOKUP, "rows"), [], r"rows is \[\], which is no object"),
        ((*LOOKUP, "bugs"), 0.5, "bugs is 0.5, which is no whole number"),
        ((*LOOKUP, "lossy"), "no", "lossy is 'no', which is neither true nor false"),
        ((*LOOKUP, "rehearsal"), {"weight_bytes": -1}, "weight_bytes is -1, which is out of range"),
        ((*LOOKUP, "shorter"), {"x": {}}, "shorter has 'x', which is no length"),
        (("specdecode", "arms"), {}, "it does not have ar, with which others are compared"),
        (("specdecode", "floor"), -3.0, "floor is -3.0, which is out of range"),
        (("specdecode", "format"), "3", "its format is '3', and this version reads 3"),
        (("specdecode", "identity", "hardware"), "../../etc", "hardware is '../../etc', which is no name"),
        (("specdecode", "identity", "dtype"), 3, "dtype is 3, which is no text"),
        (("specdecode",), GONE, "is no run of `pytest --benchmark`: it has no 'specdecode'"),
    ],
)
def test_what_cannot_be_in_a_run_is_named(path: Path, place: tuple[str, ...], value: Any, reason: str) -> None:
    """Guards against a verdict on a value that no measurement can give."""
    path.write_text(json.dumps(edited(RUN, [(place, value)])))
    with pytest.raises(ValueError, match=rf"^\S*damaged\.json .*{reason}"):
        run_file.read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no JSON"),
        (TEXT[:900], "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"null", "the file is None"),
        (bytes(range(256)), "is no text"),
        (TEXT.decode().encode("utf-16"), "is no text"),
    ],
    ids=["empty", "cut", "deep", "null", "binary", "utf-16"],
)
def test_a_file_that_is_no_run_is_named(path: Path, content: bytes, reason: str) -> None:
    """Guards against a traceback of the parser. A byte-order mark, which editors write, changes nothing."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S*damaged\.json .*{reason}"):
        run_file.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + TEXT)
    assert run_file.read(path).arms == WHOLE.arms


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("arms", "random-16", "cache"), [None], r"cache is \[None\], which is no number"),
        (("arms", "random-16", "policy"), 3, "policy is 3, which is no text"),
        (("documents",), [], "none of its documents has a token to predict"),
        (
            ("documents", 0, "reference", 0),
            1e15,
            "the mean of reference is .*, which is out of range: it is from .* to 700",
        ),
        (("documents", 0, "arms", "full", "kl"), [], "full does not have a value for each of the 24 tokens"),
        (
            ("header", "tasks", "problems"),
            {"humaval": 2},
            "it has an unknown task 'humaval': known are gsm8k, humaneval",
        ),
        (("header", "tasks", "missing"), {"mbpp": ""}, "it has an unknown task 'mbpp'"),
        (("answers", 0, "task"), "no", "it has an unknown task 'no'"),
        (("needles", 0, "ranks"), [], r"ranks is \[\], and an answer has at least one token"),
        (("needles", 0, "depth"), 2, "depth is 2, which is out of range: it is from 0 to 1"),
    ],
)
def test_what_cannot_be_in_a_run_of_quality_is_named(
    path: Path, place: tuple[Any, ...], value: Any, reason: str
) -> None:
    """Guards against tables and figures with values that no run of the quality suite can give."""
    path.write_text(json.dumps(edited(QUALITY, [(("quality", *place), value)])))
    with pytest.raises(ValueError, match=rf"^\S*damaged\.json cannot be read: .*{reason}"):
        results_file.read(path)


def test_without_times_of_plain_decoding_nothing_is_recommended(path: Path) -> None:
    """Guards against an error of the statistics library about a mean of no values."""
    path.write_text(json.dumps(edited(RUN, [(("specdecode", "arms", "ar", "rows"), {})])))
    with pytest.raises(ValueError, match=r"damaged\.json has no times of ar, which all arms are compared with"):
        recommend(run_file.read(path))


def judged(path: tuple[Any, ...]) -> bool:
    """Return whether the package reads a value: it does not read pytest-benchmark's own."""
    return path[0] != "benchmarks"


@fuzzed(20, phases=NO_SHRINKING)
@given(file=damaged(RUN, judged), is_new=st.booleans())
def test_a_damaged_run_is_refused_or_judged(path: Path, file: Damage, is_new: bool) -> None:
    """Guards against a traceback, and against results that are not finite, wherever a file is damaged."""
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
    """Guards against a traceback or infinite results for a damaged run of the quality suite."""
    path.write_bytes(file.content)
    run = taken(lambda: results_file.read(path), f"{path} ")
    if run is None:
        return
    checks = check_margins(run, {arm: {"nll": 0.1, "kl": 0.1} for arm in QUALITY["quality"]["arms"]})
    for form in (quality_tables.markdown, quality_tables.latex):
        assert "nan" not in form(run, checks)
    assert quality_page.section(run, checks, None)


@fuzzed(20, phases=NO_SHRINKING)
@given(file=damaged(MARGINS))
def test_damaged_margins_are_refused_or_taken(path: Path, file: Damage) -> None:
    """Guards against a margin that every arm passes."""
    path.write_bytes(file.content)
    margins = taken(lambda: read_margins(path), f"{path} ")
    if margins is not None:
        check_margins(results_file.read(DATA / "quality-run.json"), margins)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Guards against a file that is called damaged, because its second reading finds nothing."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or a device: name a file"):
        read_text(tmp_path / "pipe")


def test_values_are_taken_or_named() -> None:
    """Guards against a bound that is off by one, and a message that does not name the value."""
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
    with pytest.raises(ValueError, match=r"half is 0\.5, which is out of range: it is from 1 to 1e"):
        number(values, "half", least=1)


def test_nesting_without_end_is_no_json() -> None:
    """Guards against a stack overflow in the parser."""
    with pytest.raises(ValueError, match=r"deep\.json cannot be read"):
        parse_json("[" * 100_000, Path("deep.json"))
