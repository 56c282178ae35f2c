"""The fixture `paired`, in a repository without a language model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.elsewhere import Runs, commit, runs_in
from tests.helpers.root import ROOT

TESTS = """
import sys
import pytest
from sorting import total

def test_equal(paired):
    paired(new=lambda: total(300), old=lambda: total(300), seconds=0.3)
    assert not {"torch", "transformers"} & set(sys.modules)

def test_slower(paired):
    paired(lambda: total(9000), lambda: total(300), equal=lambda a, b: a > b, counters=lambda v: {"n": v}, seconds=1)

def test_wrong(paired):
    paired(new=lambda: total(301), old=lambda: total(300))

def test_alone(paired):
    paired(new=lambda: total(300), seconds=0.3)

def test_twice(paired):
    for _ in range(2):
        paired(new=lambda: total(300), old=lambda: total(300), seconds=0.3)

def test_raises(paired):
    paired(new=lambda: total("many"), old=lambda: total(300))
"""

SORTING = "def total(count):\n    return sum(number for number in range(count))\n"


@pytest.fixture
def elsewhere(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "sorting.py").write_text(SORTING)
    (tmp_path / "test_sorting.py").write_text(TESTS)
    return runs_in(tmp_path, tmp_path_factory.mktemp("packages"))


NO_TORCH = ("-p", "no:jaxtyping")  # jaxtyping's plugin imports torch


def test_without_benchmark_values_are_compared(elsewhere: Runs) -> None:
    """Guards against an ordinary test run that takes minutes, and against unequal functions that pass in it."""
    done = elsewhere(*NO_TORCH, "test_sorting.py", alone=True)
    assert "3 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "the new function returns 45150 and the old function 44850: nothing was timed" in done.stdout
    assert "paired was already called in this test: split the test in two" in done.stdout
    assert "'str' object cannot be interpreted as an integer" in done.stdout
    assert "sees slowdowns" not in done.stdout


def test_with_benchmark_they_are_timed_and_judged(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a slowdown that passes, against a project that must have a language model, and against numbers
    missing from pytest-benchmark's file or from JUnit's.
    """
    summary = tmp_path / "summary.md"
    files = ("--benchmark-json=run.json", "--junitxml=junit.xml", "-o", "junit_family=xunit1")
    done = elsewhere("--benchmark", *NO_TORCH, *files, "test_sorting.py", alone=True, GITHUB_STEP_SUMMARY=str(summary))
    assert "5 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert re.search(r"REGRESSED: test_slower time: .* tolerance 2%, sees slowdowns from", done.stdout)
    assert "REGRESSED: test_slower counters: n 4.485e+04 -> 4.05e+07" in done.stdout
    assert "paired has no old function: give it one, or run with --against REF" in done.stdout
    assert "test_slower (new)" in done.stdout
    assert "test_slower (old)" in done.stdout
    kept = {
        entry["name"]: entry["extra_info"] for entry in json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    }
    assert kept["test_slower (new)"]["time_verdict"] == "REGRESSED"
    assert (
        kept["test_slower (new)"]["speed_low"]
        < kept["test_slower (new)"]["speed"]
        < kept["test_slower (new)"]["speed_high"]
        < 0.9
    )
    assert kept["test_slower (new)"]["new_n"] > kept["test_slower (new)"]["old_n"]
    assert kept["test_equal (new)"]["time_verdict"] in ("PASS", "INCONCLUSIVE")
    assert 'name="time_verdict" value="REGRESSED"' in (tmp_path / "junit.xml").read_text()
    assert "| REGRESSED | test_slower | time |" in summary.read_text()


def test_a_wrong_option_is_told_before_any_test(elsewhere: Runs) -> None:
    """Guards against a traceback after a part of the tests was timed."""
    done = elsewhere("--benchmark", *NO_TORCH, "--again=-1", "test_sorting.py")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "again is -1.0: it is a share of the time, 0 or more" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "failed" not in done.stdout


def test_against_a_commit_the_same_test_runs_in_both(elsewhere: Runs, tmp_path: Path) -> None:
    """Guards against a commit that is compared with itself, and against processes and files that are left behind."""
    old = "\nclass Total(int):\n    pass\n\n\ndef boxed():\n    return Total(3)\n"
    (tmp_path / "src" / "sorting.py").write_text(SORTING + old)
    commit(tmp_path)
    (tmp_path / "src" / "sorting.py").write_text(
        SORTING.replace("number for", "number + len('two' * 10**4) // 10**4 for") + "\nnewer = total\nboxed = int\n"
    )
    (tmp_path / "test_sorting.py").write_text(
        "import sorting\n\n"
        "def test_total(paired):\n"
        "    paired(new=lambda: sorting.total(300), equal=lambda new, old: new == old + 900, seconds=1)\n\n"
        "def test_function(paired):\n"
        "    paired(new=lambda: lambda: 3, equal=lambda new, old: True)\n\n"
        "def test_newer(paired):\n"
        "    paired(new=lambda: sorting.newer(300))\n\n"
        "def test_boxed(paired):\n"
        "    paired(new=lambda: sorting.boxed())\n"
    )
    done = elsewhere("--benchmark", *NO_TORCH, "--against=HEAD", "test_sorting.py")
    assert "4 failed" in done.stdout, done.stdout + done.stderr
    assert "the value of HEAD cannot be read here: Can't get attribute 'Total'" in done.stdout
    assert "REGRESSED: test_total time" in done.stdout
    assert "HEAD cannot run this test: its value cannot be sent for the comparison" in done.stdout
    assert "HEAD cannot run this test: AttributeError: module 'sorting' has no attribute 'newer'" in done.stdout
    assert list((tmp_path / ".git" / "worktrees").glob("*")) == []
    done = elsewhere("--benchmark", *NO_TORCH, "--against=nowhere", "test_sorting.py")
    assert done.returncode == 2
    assert "--against nowhere cannot be checked out: fatal: invalid reference: nowhere" in done.stdout


def test_the_page_about_it_is_true(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against an example on the page that does not run."""
    page = (ROOT / "docs" / "paired.md").read_text()
    run = runs_in(tmp_path, tmp_path_factory.mktemp("packages"))
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL)):
        example = example.replace("by_loop(numbers))", "by_loop(numbers), seconds=0.3)")  # in place of five seconds
        assert "seconds=" in example
        (tmp_path / f"test_example_{number}.py").write_text(example)
    done = run(*NO_TORCH, "--benchmark", "--gate=off", ".")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
