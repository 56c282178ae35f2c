"""Finished pieces of a run on disk, line by line: what an interrupted run keeps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdecode.bench.arms.run import Run
from specdecode.bench.measure.experiment import Block
from specdecode.support.files import write_whole


def open_journal(path: Path, what: dict[str, Any], resume: bool) -> tuple[list[Block], Callable[[Block], None]]:
    """Return the blocks that an interrupted run of the same experiment left, and a function that keeps further ones.

    See `open_lines`.
    """
    finished, keep = open_lines(path, what, resume)
    return [_block(entry) for entry in finished], lambda block: keep(_entry(block))


def open_lines(
    path: Path, what: dict[str, Any], resume: bool
) -> tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]:
    """Return what an interrupted run left of the same work, piece by piece, and a function that keeps further pieces.

    Each piece is one line of plain values, on disk before the next is measured: a run that is killed loses the one that
    it was at, no more, and a line that was cut off in writing is measured again.

    Args:
        path: of the journal; started anew unless resumed.
        what: is measured, as plain values: what must be the same for pieces to be put together.
        resume: go on with what is there; from the beginning, if nothing is.

    Raises:
        ValueError: the journal to resume is of something else.
    """
    finished: list[dict[str, Any]] = []
    if resume and path.exists():
        first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or ["{}"]
        before = json.loads(first)
        if changed := [name for name in what if before.get(name) != json.loads(json.dumps(what[name]))]:
            raise ValueError(
                f"{path} holds a run with other {', '.join(changed)}: it cannot be resumed; leave out --resume to start"
                " anew"
            )
        finished = [json.loads(line) for line in lines]
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in [what, *finished]))

    def keep(entry: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    return finished, keep


def _entry(block: Block) -> dict[str, Any]:
    return {
        "prompt": block.prompt,
        "repeat": block.repeat,
        "runs": {arm: run.as_json() for arm, run in block.runs.items()},
        "last": block.last.as_json(),
        "checks": block.checks,
    }


def _block(entry: dict[str, Any]) -> Block:
    return Block(
        prompt=entry["prompt"],
        repeat=entry["repeat"],
        runs={arm: Run.from_json(run) for arm, run in entry["runs"].items()},
        last=Run.from_json(entry["last"]),
        checks=entry["checks"],
    )


def code() -> str:
    """Return a digest of the package's source: blocks of different code do not belong together."""
    sources = sorted(Path(__file__).parents[2].rglob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]
