"""The journal of a run: its finished pieces on disk, line by line, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

from filelock import FileLock, Timeout

from specdecode.bench.arms.run import Run
from specdecode.bench.measure.block import Block
from specdecode.bench.measure.check import Check
from specdecode.bench.runs.names import BASELINE
from specdecode.support.checked import count, mapping, read_text, text
from specdecode.support.files import check_writable, write_whole, writing

T = TypeVar("T")

_OWNER = "owner"
"""Key in the first line of a journal, for the process that writes the journal."""


class Journal:
    """The finished pieces of a run on disk, each as a line of plain values. Only one process at a time holds a journal.

    A piece is on disk before the next is measured, so a killed run loses only the current piece. A piece with an
    incomplete line is measured again. The lock is held until the run is finished, or the process ends.

    Args:
        path: path of the journal. An existing file is overwritten unless `resume` is set.
        values: plain values that must be equal in the journal and here, for its pieces to be used.
        resume: continue with the pieces in the file; start from the beginning if there is none.

    Raises:
        ValueError: another process holds the journal, the file cannot be written, or the file to resume is damaged or
            has other values.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.pieces: list[dict[str, Any]] = []
        check_writable(path)
        # One lock for each path and process: a second journal with this path in the same process shares the lock.
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{path} is being written by {_owner(path)}: wait until it ends, or measure in another checkout"
            ) from None
        if resume and path.exists():
            self.pieces = self._read(values)
        owner = {"pid": os.getpid(), "started": datetime.now().isoformat(" ", "seconds")}
        lines = [{**values, _OWNER: owner}, *self.pieces]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))

    def _read(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        # Text after the last line break is an incomplete line.
        lines = read_text(self.path).split("\n")[:-1]
        if not lines:
            raise ValueError(f"{self.path} is empty: it cannot be resumed; leave out --resume to start anew")
        objects = [self._object(line, number) for number, line in enumerate(lines, start=1)]
        before = objects[0]
        if changed := [name for name in values if before.get(name) != json.loads(json.dumps(values[name]))]:
            raise ValueError(
                f"{self.path} holds a run with other {', '.join(changed)}: it cannot be resumed; leave out --resume to"
                " start anew"
            )
        return objects[1:]

    def _object(self, line: str, number: int) -> dict[str, Any]:
        try:
            return mapping(json.loads(line), "a line")
        except (ValueError, RecursionError):
            raise ValueError(self._damaged(number)) from None

    def _damaged(self, number: int) -> str:
        return (
            f"line {number} of {self.path} is damaged: delete the line and those behind it to keep the rest, or leave"
            " out --resume to start anew"
        )

    def add(self, piece: Mapping[str, Any]) -> None:
        """Write a piece, and wait until it is on disk.

        Raises:
            ValueError: the journal cannot be written.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(piece) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def read(self, parse: Callable[[dict[str, Any]], T]) -> list[T]:
        """Return the parsed pieces.

        Raises:
            ValueError: a piece is damaged; the message names its line.
        """
        parsed = []
        for number, piece in enumerate(self.pieces, start=2):
            try:
                parsed.append(parse(piece))
            except (KeyError, ValueError, TypeError):
                raise ValueError(self._damaged(number)) from None
        return parsed

    def blocks(self) -> list[Block]:
        """Return the pieces as blocks of an experiment.

        Raises:
            ValueError: a piece is not a block.
        """
        return self.read(_block)

    def failures(self) -> dict[str, str]:
        """Return the error messages of arms that had failed when the last piece was written, by arm."""
        failed = mapping(self.pieces[-1].get("failures", {}), "failures") if self.pieces else {}
        return {arm: text(failed, arm) for arm in failed}

    def add_block(self, block: Block, failures: Mapping[str, str]) -> None:
        """Write a block of an experiment, and the error messages of all arms that have failed so far."""
        self.add(_entry(block) | ({"failures": dict(failures)} if failures else {}))

    def finish(self) -> None:
        """Delete the journal and release its lock, after the run is stored elsewhere."""
        self.path.unlink(missing_ok=True)
        self._lock.release(force=True)


def finished_pieces(path: Path) -> int:
    """Return the number of pieces in a journal, without reading what they hold; 0 if there is no journal."""
    if not path.exists():
        return 0
    return max(0, path.read_bytes().count(b"\n") - 1)  # the first line is no piece


def _owner(path: Path) -> str:
    """Return the process that holds a journal, from the journal's first line, in words."""
    try:
        owner = json.loads(read_text(path).partition("\n")[0])[_OWNER]
        return f"process {owner['pid']}, which began at {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _entry(block: Block) -> dict[str, Any]:
    last = {arm: run.as_json() for arm, run in block.last.items()}
    return {
        "prompt": block.prompt,
        "repeat": block.repeat,
        "runs": {arm: run.as_json() for arm, run in block.runs.items()},
        "last": last[BASELINE] if list(last) == [BASELINE] else last,
        "checks": block.checks,
        **({"middle": block.middle.as_json()} if block.middle is not None else {}),
    }


def _block(entry: dict[str, Any]) -> Block:
    checks, last = mapping(entry["checks"], "checks"), mapping(entry["last"], "last")
    if isinstance(last.get("tokens"), list):  # a single run, not a table by arm
        last = {BASELINE: last}
    block = Block(
        prompt=text(entry, "prompt"),
        repeat=count(entry, "repeat"),
        runs={arm: Run.from_json(mapping(run, arm)) for arm, run in mapping(entry["runs"], "runs").items()},
        last={arm: Run.from_json(mapping(run, arm)) for arm, run in last.items()},
        checks=checks,
        middle=Run.from_json(mapping(entry["middle"], "middle")) if "middle" in entry else None,
    )
    if not block.last or block.last.keys() - block.runs.keys():
        raise ValueError("the two runs of a reference arm are missing")
    if any(checks.get(arm) not in get_args(Check) for arm in block.runs):
        raise ValueError("a run is not checked")
    return block


def source_digest() -> str:
    """Return a digest of the package's source, so that blocks of different code are not put together."""
    sources = sorted(Path(__file__).parents[2].rglob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]
