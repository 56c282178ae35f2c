"""Finished pieces of an interrupted session of the quality suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given

from specdecode.bench.measure.journal import Journal
from specdecode.bench.quality.quality_session import Pieces
from specdecode.evals.results import Answer, Document, NeedleTrial, QualityRun
from specdecode.evals.results_file import read, write
from tests.helpers.damage import NO_SHRINKING, Damage, damaged, taken
from tests.helpers.fuzzing import fuzzed
from tests.helpers.root import ROOT

FILE = ROOT / "tests" / "data" / "quality-run.json"
RUN = json.loads(FILE.read_text())["quality"]
PIECES = [RUN["documents"][0], {"id": "needle", **RUN["needles"][0]}, {"id": "answer", **RUN["answers"][0]}]
KINDS = (Document, NeedleTrial, Answer)


@fuzzed(20, phases=NO_SHRINKING)
@given(file=damaged(PIECES))
def test_damaged_pieces_are_refused_or_read_back(tmp_path: Path, file: Damage) -> None:
    """Guards against an hour of measuring beside a piece that turns out to be damaged, and against a run file that
    cannot be read again.
    """
    path = tmp_path / "run.jsonl"
    try:
        lines = [json.dumps(piece).encode() for piece in json.loads(file.content)]
    except (ValueError, TypeError):
        lines = [file.content]
    path.write_bytes(b"".join(line + b"\n" for line in [b"{}", *lines]))
    lines = (f"line {number} of {path} is damaged" for number in range(2, 6))
    taken(lambda: _read_back(path), f"{path} cannot be read", f"{path} is damaged at", *lines)


def _read_back(path: Path) -> None:
    whole = read(FILE)
    pieces = Pieces(Journal(path, {}, resume=True))

    def make(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name != "id"}

    document, needle, answer = (
        pieces.get(values["id"], kind, lambda values=values: make(values))
        for values, kind in zip(PIECES, KINDS, strict=True)
    )
    run = QualityRun(whole.header, whole.arms, [document], [needle], [*whole.answers, answer])
    path.write_text(write(run))
    assert read(path) == run
