"""The programs in perf/ that count verdicts, each with the smallest counts."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from perf import changes, paired, trials
from tests.helpers.run_contents import SPEEDUPS, run_content


def printed(
    main: Any, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """Return the lines that a program prints."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments.split()])
    main()
    return capsys.readouterr().out.splitlines()


def counts(table: list[str]) -> dict[str, dict[str, int]]:
    """Return the counts in a table of verdicts, by kind of code and verdict."""
    (_, *names), _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return {kind: dict(zip(names, map(int, numbers), strict=True)) for kind, *numbers in rows}


def test_the_changes_found_by_chance_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a program that no longer fits the search that it examines."""
    lines = printed(changes.main, "--series 1", monkeypatch, capsys)
    shares = re.findall(r"\| (\d+)(?:\.0)?%(?= \|)", "\n".join(lines))
    assert len(shares) == 2 * 3 + 6 * 2
    assert set(shares) <= {"0", "100"}
    assert lines[-1].startswith("| 8 of 1.0% | ")


def test_verdicts_on_functions_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a planted slowdown that is not planted, and a neighbour that outlives the program."""
    lines = printed(paired.main, "--runs 1 --seconds 0.2 --slowdown 9 --neighbour", monkeypatch, capsys)
    assert [line.partition(": ")[0] for line in lines[:2]] == ["1/1 equal", "1/1 900% slower"]
    found = counts(lines[3:])
    assert found["900% slower"]["REGRESSED"] == 1
    assert sum(found["equal"].values()) == 1
    assert not multiprocessing.active_children()


def test_verdicts_on_sessions_side_by_side_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a trial whose sessions cannot begin."""
    session = trials.session
    tiny = ("--target=shape:tiny", "--device=cpu", "--dtype=float64", "--prompts=prose@20:2")
    monkeypatch.setattr(trials, "session", lambda *of: session(*of, *tiny))
    arguments = "side-by-side --runs 0 1 --slowdown 0.9 --tolerance 0.05 --tokens 4 --minutes 0.02"
    lines = printed(trials.main, arguments, monkeypatch, capsys)
    assert re.match(r"1/1 90% slower, \d+\.\d min: [A-Z]+: ", lines[0])
    assert [sum(verdicts.values()) for verdicts in counts(lines[2:]).values()] == [1]


def test_verdicts_on_sessions_by_a_baseline_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against sessions that are judged by no baseline, or counted under another kind of code."""
    asked: list[tuple[float, bool]] = []

    def session(folder: Path, slower: float, *arguments: str) -> tuple[str, str, float]:
        asked.append((slower, any((folder / "baselines").rglob("*.json"))))
        (folder / "run.json").write_text(json.dumps(run_content(SPEEDUPS)))
        return ("REGRESSED" if slower else "PASS"), "as planted", 0.1

    monkeypatch.setattr(trials, "session", session)
    lines = printed(trials.main, "by-baseline --runs 2 1", monkeypatch, capsys)
    assert asked == [(0.0, False), (0.0, True), (0.0, True), (0.05, True)]
    assert lines[0].startswith("the baseline sees slowdowns from ")
    assert lines[1:4] == [
        *("1/2 equal, 0.1 min: PASS: as planted", "2/2 equal, 0.1 min: PASS: as planted"),
        "1/1 5% slower, 0.1 min: REGRESSED: as planted",
    ]
    assert counts(lines[5:]) == {"equal": {"PASS": 2, "REGRESSED": 0}, "5% slower": {"PASS": 0, "REGRESSED": 1}}
