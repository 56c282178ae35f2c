"""The progress of long work, as shown in a log."""

from __future__ import annotations

import re

import pytest

from specdecode.support import progress


def test_what_is_left_is_told_by_the_work_at_hand(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards against a wrong estimate of the remaining time that counts earlier pieces as work of no time, or mixes two
    kinds of work.
    """
    now = 1000.0
    monkeypatch.setattr("specdecode.support.progress.time.monotonic", lambda: now)
    with progress.progress("shards") as tell:
        for now, done, total in (  # noqa: B007 (the clock reads it)
            (1000.0, 7, 20),
            (1100.0, 8, 20),
            (1300.0, 10, 20),
            (2200.0, 1, 64),
            (2240.0, 2, 64),
        ):
            tell(done, total, "features of texts")
    told = capfd.readouterr().err.splitlines()
    assert [re.findall(r"(\S+) shards, (\d+) s, (\S+)", line)[0] for line in told] == [
        ("7/20", "0", "starting:"),
        ("8/20", "100", "1200"),
        ("10/20", "300", "1000"),
        ("1/64", "1200", "starting:"),
        ("2/64", "1240", "2480"),
    ]


def test_names_on_a_bar_are_text(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against an arm whose name ends the session, or loses its brackets."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.progress("[/texts]") as tell:
        tell(1, 2, "lookup[fast] [/x]")
    assert "lookup[fast] [/x]" in capfd.readouterr().err
