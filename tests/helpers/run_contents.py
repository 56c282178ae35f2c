"""The content of a run file with speedups that a test sets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from specdecode.bench.runs.counts import Histograms, RowCounts, RowSeconds
from specdecode.bench.runs.file import parse, run_json
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile

PROMPTS = ("text/0", "text/1", "prose/0")
IDENTITY = Identity("abacus-2-threads", "t", "d", "float32", "quick")
SPEEDUPS = {"ar": 1.0, "linear": 2.0, "lookup": 1.3, "hf-generate": 0.9, "hf-assisted": 1.5}
PEERS = {"ar": "hf-generate", "linear": "hf-assisted"}


def run_content(
    speedups: dict[str, float],
    hardware: str = IDENTITY.hardware,
    drafting: float = 0.3,
    reason: str = "",
    date: str = "2026-01-02",
    **of_all: Any,
) -> dict[str, Any]:
    """Return a run file in which each arm has about one speedup. All but `ar` and transformers' arms draft three
    tokens.
    """
    identity = Identity(hardware, "t", "d", "float32", "quick")
    versions: dict[str, str | int] = {"torch": "2", "threads": 2}
    around = {"before": {"load average": "0.1"}, "after": {"load average": "0.9"}}
    header = Header(identity, 40, dict.fromkeys(PROMPTS, "x"), 0.01, 100.0, versions, around)
    arms = {}
    for arm, speedup in speedups.items():
        rows = {}
        for i, prompt in enumerate(PROMPTS):
            log = math.log(speedup) + (0.02 * i if arm != "ar" else 0.0)
            total = math.exp(-log)
            counts: dict[str, float] = {"runs": 1, "tokens": 40, "steps": 20, "target_forwards": 20, "later_tokens": 30}
            seconds = {"total": total, "ttft": 0.1 * total}
            histograms = {}
            if not arm.startswith("hf"):
                parts = {"draft": drafting, "verify": 0.6, "overhead": 0.1}
                seconds |= {name: share * total for name, share in parts.items()}
                seconds |= {"later_draft": 0.2 * total, "later_verify": 0.5 * total}
                histograms = {"accepted": [20], "depth": [20]}
                if arm != "ar":
                    counts |= {"drafted": 60, "accepted": 20}
                    histograms = {"accepted": [8, 6, 4, 2], "depth": [0, 0, 0, 20]}
            rows[prompt] = Row(log, RowCounts(**counts), RowSeconds(**seconds), Histograms(**histograms))
        arms[arm] = ArmRecord(rows, against=PEERS.get(arm), peer=arm.startswith("hf"), **of_all)
    run = RunFile(Path(), header, arms)
    return {
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": f"{date}T00:00:00",
        "specdecode": {**run_json(run), "reason": reason},
        "benchmarks": [],
    }


def scored_run(speedups: dict[str, float]) -> RunFile:
    """Return a run as read back from its file, with scores of the outputs. `lookup` is lossy."""
    content = run_content(speedups)
    for arm, record in content["specdecode"]["arms"].items():
        record["lossy"] = arm == "lookup"
        for row in record["rows"].values():
            row["counts"] |= {"nll": 20.0, "ngrams": 37, "repeated": 1, "agreed": 30}
            row["counts"] |= {"peak_cache_bytes": 10e6, "grown_bytes": 2e6, "compressions": 1}
    return parse(json.dumps(content), Path("run.json"))
