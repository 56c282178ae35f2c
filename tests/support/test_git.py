"""Git's reasons."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specdecode.support.git import git
from tests.helpers.repository import commit
from tests.helpers.repository import git as run_git

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


GPG = """#!/bin/sh
BEGIN="-----BEGIN PGP SIGNATURE-----"
cat > /dev/null
echo "gpg: Good signature" >&2
case "$*" in *--verify*) echo "[GNUPG:] GOODSIG 0 A" ;; *) echo "[GNUPG:] SIG_CREATED " >&2; echo "$BEGIN" ;; esac
"""


def test_settings_of_the_user_do_not_change_what_is_read(tmp_path: Path) -> None:
    """Guards against signatures among the lines of a log, and against paths that are not from the repository's top."""
    program = tmp_path / "gpg"
    program.write_text(GPG)
    program.chmod(0o755)
    folder = tmp_path / "repository" / "below"
    folder.mkdir(parents=True)
    for arguments in (
        ("init", "--quiet"),
        ("config", "gpg.program", str(program)),
        ("config", "commit.gpgSign", "true"),
        ("config", "log.showSignature", "true"),
        ("config", "diff.relative", "true"),
    ):
        run_git(folder.parent, *arguments)
    (folder / "file").touch()
    commit(folder.parent, "signed")
    assert "gpg: Good signature" in run_git(folder, "log")
    assert git("log", "--name-only", "--format=%s", root=folder).split() == ["signed", "below/file"]
