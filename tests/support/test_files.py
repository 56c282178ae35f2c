"""Files that are complete or absent."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from specdecode.support.files import check_writable, slug, whole, write_whole

_WRITES = 300


def _write_and_read(file: Path, letter: str) -> list[str]:
    """Write one letter many times, and read the file after each write. Return the faults."""
    faults = []
    for _ in range(_WRITES):
        try:
            write_whole(file, letter * 4000)
        except ValueError as error:
            faults.append(type(error).__name__)
        content = file.read_text()
        if len(content) != 4000 or len(set(content)) != 1:
            faults.append("torn")
    return faults


def test_two_processes_write_the_same_file(tmp_path: Path) -> None:
    """Guards against one temporary name for all processes: one would rename a file that another still writes."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        faults = pool.starmap(_write_and_read, [(tmp_path / "run.json", letter) for letter in "ab"], chunksize=1)
    assert faults == [[], []]
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Guards against half a file, and against temporary files that accumulate."""
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


def test_what_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    """Guards against a traceback, a message that does not name the obstacle, and a check that misses it."""
    in_the_way, made = tmp_path / "results", tmp_path / "made" / "run.json"
    in_the_way.write_text("no folder")
    for file, reason in (
        (in_the_way / "run.json", f"{in_the_way} is no folder"),
        (in_the_way / "a" / "b" / "run.json", f"{in_the_way} is no folder"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        for write in (check_writable, partial(write_whole, content="new")):
            with pytest.raises(ValueError, match=re.escape(f"{file} cannot be written: {reason}")):
                write(file)
    check_writable(made)
    assert made.parent.is_dir()
    assert {path.name for path in tmp_path.rglob("*")} == {"results", "made"}


def _write_on_a_full_disk(file: Path) -> list[str]:
    """Write a file of two blocks where only one fits. Return the messages."""
    # A limit on a file's size stands in for a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    said = []
    for write in (partial(write_whole, content="x" * 8192), check_writable):
        try:
            write(file)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 4096))
    try:
        check_writable(file)
    except ValueError as error:
        said.append(str(error))
    return said


def test_a_full_disk_is_told_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Guards against half a run file, a traceback, and a check that passes because an empty file fits."""
    file = tmp_path / "run.json"
    file.write_text("before")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (said,) = pool.map(_write_on_a_full_disk, [file])
    full = f"{file} cannot be written: File too large"
    assert said == [full, "", full]
    assert file.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["run.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Guards against a link that is replaced by a file while its target stays unchanged."""
    link, file = tmp_path / "latest.json", tmp_path / "runs" / "today.json"
    link.symlink_to(file)
    check_writable(link)
    write_whole(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert [found.name for found in file.parent.iterdir()] == ["today.json"]


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    """Guards against /dev/stdout or /dev/null replaced by a file, where the user has write access there."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    with ThreadPoolExecutor(1) as reader:
        content = reader.submit(pipe.read_text)
        write_whole(pipe, "through the pipe")
        if not pipe.is_fifo():
            pipe.unlink()
            pytest.fail("a file took its place")
        assert content.result() == "through the pipe"
    assert [found.name for found in tmp_path.iterdir()] == ["pipe"]


def test_names_in_any_script_give_file_names() -> None:
    """Guards against files of two models under one name, because no letter of either is left."""
    names = [slug(name) for name in ("草稿甲", "草稿乙", "../")]
    assert len(set(names)) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)
    assert (slug(""), slug("Org/Model_1.5")) == ("", "org-model-1.5")
