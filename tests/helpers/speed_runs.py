"""Speed runs with known content, as read back from their files."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from specdecode.bench.measure.experiment import Results
from specdecode.bench.runs.counts import Histograms, RowCounts, RowSeconds
from specdecode.bench.runs.file import parse, run_json
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile

LENGTHS = (10, 20, 40)
PROMPTS = ("text/0", "text/1", "prose/0")
MODEL, WINDOW = {"drafter": "model"}, {"policy": "sink-window"}
ARMS: dict[str, dict[str, Any]] = {
    "ar": {"against": "hf-generate"},
    "ar-64": WINDOW | {"cache": 64},
    "ar-128": WINDOW | {"cache": 128},
    "linear-k2": MODEL | {"k": 2, "against": "hf-assisted"},
    "linear-k4": MODEL | {"k": 4},
    "streaming-k4-64": MODEL | WINDOW | {"k": 4, "cache": 64},
    "streaming-k4-128": MODEL | WINDOW | {"k": 4, "cache": 128},
    "tree": MODEL | {"shape": "static", "k": 3},
    "linear-cost-aware": MODEL | {"controller": "cost-aware"},
    "lookup": {"drafter": "lookup", "k": 3},
    "lookup-int8": {"drafter": "lookup", "k": 3, "quantize": "int8"},
    "replayed": MODEL | {"k": 3, "replay": 0.8},
    "hf-generate": {"peer": "generate"},
    "hf-assisted": {"peer": "assisted", "k": 2},
}
SPEEDUPS = dict(zip(ARMS, (1.0, 1.02, 1.01, 1.5, 1.7, 1.9, 1.8, 1.4, 1.65, 1.2, 0.7, 2.2, 0.9, 1.3), strict=True))


def sweep_row(arm: str, options: dict[str, Any], length: int, place: int) -> Row:
    """Return the row of one arm on one prompt: sizes and speeds that differ by arm, length and prompt, all known."""
    log = math.log(SPEEDUPS.get(arm, 1.5)) + (0.04 * place if arm != "ar" else 0.0)
    total = length * math.exp(-log) * (1 + 0.1 * place)
    peer, k, cache_ = "peer" in options, options.get("k", 0), options.get("cache", 0)
    lossy = bool(cache_) or "quantize" in options
    counts: dict[str, float] = {"runs": 1, "tokens": length, "steps": length // 2}
    counts |= {"agreed": length * (cache_ / 256 if cache_ else 0.4) if lossy else length, "ngrams": 100}
    counts["repeated"] = 60 if arm == "ar-64" else 10
    seconds = {"total": total, "ttft": 0.1 * total}
    histograms = {}
    if not peer:
        counts |= {"later_tokens": length - 3, "drafted": 3 * k, "accepted": 2 * k, "rejections": k}
        counts |= {
            "peak_cache_bytes": 1e6 * min(length, cache_ / 8 or length),
            "compressions": 8 * length // (cache_ or 1e9),
        }
        seconds |= {"draft": 0.2 * total, "verify": 0.7 * total, "overhead": 0.1 * total}
        seconds |= {"later_draft": 0.2 * total, "later_verify": 0.6 * total}
        histograms = {"accepted": [4, *[3] * k], "depth": [0] * k + [4 + 3 * k]}
    if arm == "ar":
        seconds["last"] = total * math.exp(0.02)
    return Row(log, RowCounts(**counts), RowSeconds(**seconds), Histograms(**histograms))


def sweep(arms: dict[str, dict[str, Any]], prompts: tuple[str, ...] = PROMPTS, **header: Any) -> RunFile:
    """Return a run as read back from its file."""
    records = {}
    for arm, options in arms.items():
        rows = {length: {p: sweep_row(arm, options, length, i) for i, p in enumerate(prompts)} for length in LENGTHS}
        records[arm] = ArmRecord(
            rows.pop(LENGTHS[-1]),
            synthetic="replay" in options,
            against=options.get("against"),
            lossy="policy" in options or "quantize" in options,
            peer="peer" in options,
            options=options,
            shorter=rows,
        )
    identity = Identity("abacus", "t", "d", "float32", "sweep")
    fields = {
        "identity": identity,
        "max_new_tokens": LENGTHS[-1],
        "outputs": dict.fromkeys(prompts, "x"),
        "floor": 0.03,
    }
    return read_back(RunFile(Path(), Header(**fields | header), records))


def read_back(run: RunFile) -> RunFile:
    return parse(content(run), Path("run.json"))


def content(run: RunFile) -> str:
    return json.dumps({"specdecode": run_json(run), "datetime": "2026-01-01T00:00:00"})


@cache
def whole_sweep() -> RunFile:
    return sweep(ARMS)


OUTPUT_TOKENS = 40


def speed_arm(
    speed: float | list[float],
    options: dict[str, Any],
    cache: float = 10e6,
    weights: float = 100e6,
    scatter: float = 0.005,
    loops: Collection[int] = (),
    evictions: int = 0,
    prompts: int = 8,
    **of_all: Any,
) -> ArmRecord:
    """Return one arm on texts of which some loop. Its speed is one number with scatter, or one number for each text."""
    speeds = [speed] * prompts if isinstance(speed, float) else speed
    noise = np.random.default_rng(list(json.dumps(options).encode())).normal(0.0, scatter, len(speeds))
    drafting = "drafter" in options
    rows = {}
    for i, each in enumerate(speeds):
        log = math.log(each) + (noise[i] if options else 0.0)
        counts: dict[str, float] = {"runs": 1, "tokens": OUTPUT_TOKENS, "agreed": 30, "steps": 20, "ngrams": 10}
        counts["repeated"] = 8 if i in loops else 1
        histograms = {}
        if "peer" not in options:
            counts |= {"target_forwards": 20, "peak_cache_bytes": cache, "grown_bytes": 2e6, "compressions": evictions}
            histograms = {"accepted": [10, 10], "depth": [0, 20]} if drafting else {"accepted": [20], "depth": [20]}
        seconds = RowSeconds(total=math.exp(-log), ttft=0.1)
        rows[f"text/{i}"] = Row(log, RowCounts(**counts), seconds, Histograms(**histograms))
    lossy = "policy" in options or "quantize" in options
    counted = CountersRun(weight_bytes=weights)
    return ArmRecord(rows, lossy=lossy, peer="peer" in options, options=options, counters_run=counted, **of_all)


def speed_run(
    floor: float = 0.01, identity: tuple[str, ...] = ("abacus", "t", "d", "float32"), **arms: ArmRecord
) -> RunFile:
    """Return a run as read back from its file. Underscores in arm names become dashes."""
    named = {"ar": arms.pop("ar", speed_arm(1.0, {}))} | {
        name.replace("_", "-"): record for name, record in arms.items()
    }
    outputs = dict.fromkeys(named["ar"].rows, "x")
    header = Header(Identity(*identity, "quick"), OUTPUT_TOKENS, outputs, floor, versions={"backend": "eager"})
    return parse(json.dumps({"specdecode": run_json(RunFile(Path(), header, named))}), Path("run.json"))


def run_of_results(results: Results, max_new_tokens: int) -> RunFile:
    """Return the results of an experiment as read back from the file."""
    identity = Identity("abacus", "t", "d", "float32", "quick")
    header = Header(identity, max_new_tokens, results.outputs(), results.floor, baseline=results.baseline)
    return read_back(RunFile(Path(), header, results.records()))
