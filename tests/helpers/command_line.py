"""The command line, run in this process."""

from __future__ import annotations

import sys

import pytest

from specdecode import cli


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["specdecode", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)
