"""Files that are there whole or not at all."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from specdecode.support.files import whole, write_whole

_WRITES = 300


def _write_and_read(file: Path, letter: str) -> list[str]:
    """Write one letter many times, and read the file after each write; what went wrong."""
    faults = []
    for _ in range(_WRITES):
        try:
            write_whole(file, letter * 4000)
        except OSError as error:
            faults.append(type(error).__name__)
        content = file.read_text()
        if len(content) != 4000 or len(set(content)) != 1:
            faults.append("torn")
    return faults


def test_two_processes_write_the_same_file(tmp_path: Path) -> None:
    """Guards against one temporary name for all processes: the one would rename what the other still writes."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        faults = pool.starmap(_write_and_read, [(tmp_path / "run.json", letter) for letter in "ab"], chunksize=1)
    assert faults == [[], []]
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Guards against half a file, and against temporary files that pile up."""
    file = tmp_path / "made" / "run.json"
    write_whole(file, "before")

    def fail() -> None:
        with whole(file) as scratch:
            scratch.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_text() == "before"
    assert [found.name for found in file.parent.iterdir()] == ["run.json"]
