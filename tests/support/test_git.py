"""Git's reasons."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specdecode.support.git import git

REFUSING = """#!/bin/sh
echo "warning: something else" >&2
echo "fatal: detected dubious ownership in repository at '/here'" >&2
echo "To add an exception for this directory, call:" >&2
echo "	git config --global --add safe.directory /here" >&2
exit 128
"""


def test_the_reason_is_gits_own_and_not_its_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a message that ends in a command without saying what is wrong."""
    program = tmp_path / "git"
    program.write_text(REFUSING)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match=r"^fatal: detected dubious ownership in repository at '/here'$"):
        git("log")
