"""The search for the commit that made an arm slow: with verdicts set by tests, and once with real ones."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.measure.bisect import Bisection, Commit, Measure, commits_between, conclusion
from specdecode.bench.plan import Plan
from specdecode.bench.runs.statistics import Estimate
from tests.helpers.characters import save
from tests.helpers.command_line import exit_code
from tests.helpers.repository import commit, git, package_repository, slow_down_verification
from tests.helpers.suites import start_python

GOOD = Commit("good", "2026-01-01", "is fast")


def commits(count: int) -> list[Commit]:
    return [Commit(f"c{place}", "2026-01-02", f"change {place}") for place in range(count)]


def judgement(verdict: Verdict, compared: bool = True) -> Judgement:
    return Judgement("lookup", "time", verdict, "as measured", Estimate(0.9, 0.8, 1.0) if compared else None)


def slow_from(
    first: int, broken: Collection[int] = (), undecided: Collection[int] = (), log: list[tuple[int, int]] | None = None
) -> Measure:
    """Return a measure by which all commits from one on are slow. Some cannot be measured, and some stay
    inconclusive.
    """

    def measure(name: str, repeats: int) -> Judgement:
        place = int(name[1:])
        if log is not None:
            log.append((place, repeats))
        if place in broken:
            raise ValueError(f"{name} cannot load")
        if place in undecided:
            return judgement(Verdict.INCONCLUSIVE)
        return judgement(Verdict.REGRESSED if place >= first else Verdict.PASS)

    return measure


def searched(count: int, measure: Measure, repeats: int = 1) -> Bisection:
    bisection = Bisection(commits(count), repeats)
    bisection.search(measure, lambda line: None)
    return bisection


@given(count=st.integers(1, 40), data=st.data())
def test_the_first_slow_commit_is_named_in_as_few_steps_as_halving_takes(count: int, data: st.DataObject) -> None:
    """Guards against a search that is off by one, or that measures every commit."""
    first = data.draw(st.integers(0, count - 1))
    bisection = searched(count, slow_from(first))
    assert bisection.suspects == [commits(count)[first]]
    assert bisection.finished
    assert len(bisection.trials) <= 1 + math.ceil(math.log2(count))


@given(count=st.integers(2, 20), data=st.data())
def test_what_cannot_be_told_is_never_ruled_out(count: int, data: st.DataObject) -> None:
    """Guards against an innocent commit that is blamed because the guilty one before it could not be measured."""
    first = data.draw(st.integers(0, count - 1))
    places = st.sets(st.integers(0, count - 2))
    broken, undecided = data.draw(places), data.draw(places)
    bisection = searched(count, slow_from(first, broken, undecided))
    suspects = [int(suspect.id[1:]) for suspect in bisection.suspects]
    assert first in suspects
    if not undecided:
        # One suspect is left, besides unmeasurable commits right before it.
        assert set(suspects) - broken <= {suspects[-1]}
    else:
        told = [place for place in suspects[:-1] if bisection.trials.get(place) and bisection.trials[place].judgement]
        assert all(bisection.trials[place].verdict is Verdict.INCONCLUSIVE for place in told)


def test_where_the_runs_cannot_tell_they_are_repeated_up_to_a_bound() -> None:
    """Guards against an endless measurement of inconclusive commits, and against the full number of repeats at each of
    them.
    """
    log: list[tuple[int, int]] = []
    bisection = searched(40, slow_from(20, undecided=range(10, 30), log=log), repeats=2)
    assert log[0] == (39, 2)
    again = [repeats for place, repeats in log if place in range(10, 30)]
    assert again == [2, 4, 8] * 3
    assert len(bisection.suspects) > 1
    assert "the runs can't tell which" in conclusion(bisection, GOOD, 0.97)


def test_a_wrong_output_is_skipped_at_once() -> None:
    """Guards against a commit with wrong outputs that is called slow, or measured again."""
    log: list[str] = []

    def measure(name: str, repeats: int) -> Judgement:
        log.append(name)
        if name == "c1":
            return judgement(Verdict.REGRESSED, compared=False)
        return judgement(Verdict.REGRESSED if name == "c3" else Verdict.PASS)

    bisection = searched(4, measure)
    assert log == ["c3", "c1", "c0", "c2"]
    assert bisection.trials[1].why_skipped == "as measured"
    assert bisection.suspects == [commits(4)[3]]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Create a repository with five commits, and a merged branch of two commits after the second. Return it with the
    ids without the branch's.
    """
    folder = tmp_path_factory.mktemp("merged")
    settings = 'target = "shape:tiny"\ntolerance = 0.2\ntolerances = { lookup = 0.3 }'
    (folder / "pyproject.toml").write_text(f"[tool.specdecode]\n{settings}\n")
    git(folder, "init", "--quiet", "--initial-branch=trunk")
    ids = [commit(folder, f"trunk {place}") for place in range(2)]
    git(folder, "switch", "--quiet", "--create", "branch")
    for place in range(2):
        commit(folder, f"branch {place}")
    git(folder, "switch", "--quiet", "trunk")
    ids.append(commit(folder, "trunk 2"))
    git(folder, "merge", "--quiet", "--no-edit", "branch")
    ids.append(git(folder, "rev-parse", "--short", "HEAD").strip())
    return folder, [*ids, commit(folder, "trunk 4")]


@pytest.fixture
def history(merged: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Enter the repository of `merged`, and return its ids."""
    folder, ids = merged
    monkeypatch.chdir(folder)
    return ids


def test_only_first_parents_are_suspects(history: list[str]) -> None:
    """Guards against blaming a commit inside a merged branch, which was never meant to work by itself."""
    first, later = commits_between(history[0], "trunk", Path())
    assert [first.id, *(each.id for each in later)] == history
    assert first.subject == "trunk 0"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that replaces measuring by a test's verdicts, and returns the list of measured commits, in
    order.
    """

    def measured(say: Callable[[str], Verdict], outside: Sequence[str] = ()) -> list[str]:
        log: list[str] = []

        def measure(plan: Plan, arms: list[str], new: str) -> Any:
            log.append(new)
            found = say(new)
            assert (plan.tolerance, plan.tolerances) == (pytest.approx(0.05), {})
            assert plan.identity.target == "shape:tiny"
            judgement = Judgement(arms[0], "time", found, "so it is", Estimate(0.9, 0.8, 1.0))
            return SimpleNamespace(judgements=[judgement], outside=outside)

        monkeypatch.setattr("specdecode.bench.measure.speed_session.measure", measure)
        return log

    return measured


OPTIONS = ("-k", "lookup", "--below", "0.95", "--device", "cpu")


def test_the_command_names_the_commit(
    history: list[str], measured: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a search whose result nobody can check."""
    log = measured(lambda new: Verdict.REGRESSED if history.index(new) >= 2 else Verdict.PASS)
    assert exit_code(monkeypatch, "bisect", history[0], "HEAD", *OPTIONS) == 0
    out, err = capsys.readouterr()
    assert f"{history[2]} (" in out
    assert "trunk 2) is the first that is slower than 0.95 of" in out
    rows = [line.split()[1] for line in out.splitlines() if "│ 0.900 [0.800, 1.000] │" in line]
    assert rows == sorted(log, key=history.index)
    assert "step 1 of about 3" in err


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict.PASS, "is not slower than 0.95 of"),
        (Verdict.IMPROVED, "There is nothing to find"),
        (Verdict.INCONCLUSIVE, "The runs can't tell whether"),
    ],
)
def test_a_bad_commit_that_is_not_slow_is_told(
    verdict: Verdict,
    said: str,
    history: list[str],
    measured: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against a commit that is blamed although there is no slowdown."""
    log = measured(lambda new: verdict)
    assert exit_code(monkeypatch, "bisect", history[0], history[-1], *OPTIONS) == 1
    assert set(log) == {history[-1]}
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("outside", [("lookup",), ("other",)])
def test_code_outside_of_the_repository_is_told(
    outside: Sequence[str],
    history: list[str],
    measured: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against "not slower" for commits that all ran the same code."""
    measured(lambda new: Verdict.PASS, outside)
    assert exit_code(monkeypatch, "bisect", history[0], history[-1], *OPTIONS) == 1
    said = f"the code of lookup is not in this repository: {history[0]} and {history[-1]} ran the same"
    assert (said in " ".join(capsys.readouterr().err.split())) == (outside == ("lookup",))


def test_an_interrupt_shows_what_is_known(
    history: list[str], measured: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against hours of measuring lost by Ctrl-C."""

    def say(new: str) -> Verdict:
        if new != history[-1]:
            raise KeyboardInterrupt
        return Verdict.REGRESSED

    measured(say)
    assert exit_code(monkeypatch, "bisect", history[0], history[-1], *OPTIONS) == 130
    out = capsys.readouterr().out
    assert f"│ {history[-1]} │" in out
    assert f"among {', '.join(history[1:])}: the search was not finished" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "HEAD"], "nowhere: no such commit"),
        (["HEAD~2", "nowhere"], "nowhere: no such commit"),
        (["HEAD", "HEAD~1"], "HEAD is no ancestor of HEAD~1"),
        (["HEAD", "trunk"], "are the same commit"),
        (["HEAD~1", "HEAD", "-k", "lokup"], "the preset has no arm 'lokup': choose from ar, "),
        (["HEAD~1", "HEAD", "--below", "1.1"], "--below is 1.1"),
        (["HEAD~1", "HEAD", "--below", "nan"], "--below is nan"),
        (["HEAD~1", "HEAD", "--repeats", "0"], "repeats is 0"),
        (["HEAD~1", "HEAD", "--preset", "nothing"], "no preset is named 'nothing'"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(
    arguments: list[str],
    said: str,
    history: list[str],
    measured: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against loading a model, and then a traceback, for a typing error."""
    log = measured(lambda new: Verdict.PASS)
    assert exit_code(monkeypatch, "bisect", *OPTIONS, *arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n"), log) == ("", 1, [])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Create a repository of this package with three later commits: broken, repaired, and slow. Return it with their
    ids.
    """
    folder = tmp_path_factory.mktemp("repository")
    ids = [package_repository(folder)]
    package = folder / "specdecode" / "__init__.py"
    whole = package.read_text()
    package.write_text("import no_such_module\n" + whole)
    ids.append(commit(folder, "broken"))
    package.write_text(whole)
    ids.append(commit(folder, "whole"))
    slow_down_verification(folder, seconds=0.02)
    return folder, [*ids, commit(folder, "slow")]


def bisecting(good: str, *more: str) -> list[str]:
    options = ["-k", "lookup", "--below", "0.5", "--device", "cpu", "--dtype", "float64", "--draft", "layers:0"]
    sizes = ["--prompts", "prose@60:6", "--max-new-tokens", "4"]
    return ["bisect", good, "HEAD", *options, *sizes, *more]


FORKING = """
import os, sys
from specdecode.bench.measure import steady
from specdecode.cli import main
from tests.helpers.forked import use_forks
os.chdir(sys.argv[1])
use_forks()
steady.watch = lambda *_, **__: lambda: 0.0  # other tests run beside this one: repeats would only take time
sys.argv[1:2] = []
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
"""A search in a fork, whose workers are forks too. In the test of an interrupt all are processes of their own."""


def test_a_planted_slowdown_is_found_past_a_commit_that_cannot_be_measured(
    repository: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Guards against two commits that run the same code, and against a search that stops at a broken commit."""
    folder, (good, broken, whole, slow) = repository
    command = bisecting(good, "--target", str(save(tmp_path / "model", layers=2)))
    done = start_python(FORKING, str(folder), *command).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if line.startswith("│")]
    verdicts = [(row[1], row[3]) for row in rows if row[1]]
    assert verdicts == [(good, "good"), (broken, "skipped"), (whole, "PASS"), (slow, "REGRESSED")]
    assert done.stdout.splitlines()[-1].startswith(f"{slow} (")
    assert "slow) is the first that is slower than 0.5" in done.stdout
    assert "no_such_module" in done.stdout
    assert "mostly verifying" in done.stdout
    assert git(folder, "worktree", "list").count("\n") == 1


def lives(group: int) -> bool:
    """Return whether a process of the group is alive."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_leaves_neither_worktree_nor_process(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Guards against checkouts and workers that are left behind after an interrupt."""
    folder, (good, *_) = repository
    command = bisecting(good, "--target", str(save(tmp_path / "model", layers=2)), "--repeats", "10000")
    process = subprocess.Popen(
        [sys.executable, "-m", "specdecode", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        # A background job of a shell ignores the signal, and so do its children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while (trees := git(folder, "worktree", "list").count("\n")) < 3 and process.poll() is None:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (trees, process.returncode) == (3, 130), err
    assert git(folder, "worktree", "list").count("\n") == 1
    deadline = time.monotonic() + 10  # init takes a while to reap ended processes
    while lives(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
