"""Runs of the quality suite with known content, and speed runs to go with them."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

from specdecode.bench.runs.counts import RowCounts, RowSeconds
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile
from specdecode.evals.results import (
    Answer,
    Document,
    NeedleTrial,
    QualityHeader,
    QualityRun,
    TasksHeader,
    Trace,
)
from tests.helpers.speed_runs import WINDOW, read_back

HEADER = QualityHeader(
    target="t",
    dtype="float32",
    preset="quick",
    texts="prose@5:3",
    origins=["prose: here"],
    tasks=TasksHeader(
        problems={"gsm8k": 2, "humaneval": 10},
        max_new_tokens=9,
        arms=["full", "window-8"],
        origins=["humaneval: here"],
        missing={"gsm8k": "gsm8k is not available"},
    ),
    k=3,
    window=None,
    stride=None,
    backend="eager",
    synthetic=False,
    versions={},
)
ARMS: dict[str, dict[str, Any]] = {
    "full": {"k": 7},
    "sink-window-16": WINDOW | {"cache": 16},
    "sink-window-8": WINDOW | {"cache": 8},
    "key-norm-8": {"policy": "key-norm", "cache": 8},
    "heavy-hitter-8": {"policy": "heavy-hitter", "cache": 8},
    "int8": {"quantize": "int8"},
    "int8-sink-window-8": {"quantize": "int8", "policy": "sink-window", "cache": 8},
    "random-8": {"policy": "random", "cache": 8, "control": "sink-window-8"},
    "no-sinks-8": {"policy": "sink-window", "cache": 8, "sinks": 0, "control": "sink-window-8"},
}
COSTS = dict(zip(ARMS, (0.0, 0.1, 0.3, 0.6, 0.2, 0.01, 0.4, 1.0, 2.0), strict=True))
SPEEDS: dict[str, tuple[float, dict[str, Any]]] = {
    "ar": (1.0, {}),
    "ar-8": (1.1, WINDOW | {"cache": 8}),
    "linear": (1.5, {"drafter": "model", "k": 3}),
    "streaming-16": (1.8, {"drafter": "model", "k": 3, "policy": "sink-window", "cache": 16}),
    "streaming-8": (1.7, {"drafter": "model", "k": 3, "policy": "sink-window", "cache": 8}),
    "lookup-int8": (0.6, {"drafter": "lookup", "k": 3, "quantize": "int8"}),
    "lookup-32": (1.2, {"drafter": "lookup", "k": 3, "policy": "sink-window", "cache": 32}),
    "hf-generate": (0.9, {"peer": "generate"}),
}


def quality_run(arms: dict[str, dict[str, Any]], documents: int = 5, **header: Any) -> QualityRun:
    """Build a run over documents of twelve tokens. Each arm adds its own cost behind the eighth token, more in each
    document.
    """

    def trace(arm: str, document: int) -> Trace:
        behind = [0] * 8 + [1, 2, 3, 4] if "policy" in arms[arm] else [0] * 12
        cost = COSTS.get(arm, 0.5) * (1 + 0.1 * document)
        own = [cost if since or not any(behind) else 0.0 for since in behind]
        return Trace([2.0 + each for each in own], [0.7 * each for each in own], [1, 0] * 6, behind)

    read_ = [Document(f"prose/{i}", [2.0] * 12, {arm: trace(arm, i) for arm in arms}) for i in range(documents)]
    sought = [
        NeedleTrial(arm, length, depth, 2 * math.log(0.75) if depth else -20.0, [0, 0], bool(depth))
        for arm in ("full", "sink-window-8")
        for length in (8, 16)
        for depth in (0.0, 1.0)
        if arm in arms
    ]
    tasks = TasksHeader({"humaneval": 3}, max_new_tokens=9, arms=["full"], origins=["humaneval: here"], missing={})
    answers = [
        Answer(arm, "humaneval", f"humaneval/{i}", "it failed" * (arm == "full" and i == 0), 5, "text")
        for i in range(3)
        for arm in ("reference", "full")
        if "full" in arms
    ]
    return QualityRun(dataclasses.replace(HEADER, **{"tasks": tasks} | header), arms, read_, sought, answers)


def quality_speeds(arms: dict[str, tuple[float, dict[str, Any]]], target: str = "t") -> RunFile:
    records = {}
    for arm, (speedup, options) in arms.items():
        rows = {}
        for place in range(3):
            log = math.log(speedup) + (0.03 * place if arm != "ar" else 0.0)
            seconds = {"total": math.exp(-log), "ttft": 0.1} | ({"last": 1.01} if arm == "ar" else {})
            rows[f"prose/{place}"] = Row(log, RowCounts(runs=1, tokens=40, steps=20), RowSeconds(**seconds))
        records[arm] = ArmRecord(rows, lossy="policy" in options or "quantize" in options, options=options)
    header = Header(Identity("abacus", target, "d", "float32", "quick"), 40, dict.fromkeys(rows, "x"), 0.02)
    return read_back(RunFile(Path(), header, records))


@cache
def whole_quality_run() -> QualityRun:
    return quality_run(ARMS)


@cache
def whole_speeds() -> RunFile:
    return quality_speeds(SPEEDS)
