"""Run files: pytest-benchmark's JSON with the data that a gate needs. Each value is checked when it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from specdecode.bench.runs.counts import (
    RowCounts,
    RowSeconds,
    as_dict,
    from_dict,
    histograms_in,
    lacks_our_counts,
    latencies_in,
)
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile
from specdecode.support.checked import (
    MOST_NATS,
    count,
    counts,
    flag,
    items,
    mapping,
    number,
    parse_json,
    read_text,
    text,
    texts,
)
from specdecode.support.files import slug, write_whole

# pytest-benchmark's commit id in a folder without a repository.
_UNVERSIONED = "unversioned"

FORMAT = 3
KEY = "specdecode"

MOST_LOG = 20
"""Bound of the logarithms of speed ratios. A file with a value beyond it is damaged."""


def run_json(run: RunFile) -> dict[str, Any]:
    """Return the value of the key "specdecode" in the file.

    It has all measured arms, also those whose tests were not selected: other arms are compared with them.
    """
    arms = {arm: _arm_json(record) for arm, record in run.arms.items()}
    header = {name: value for name, value in asdict(run.header).items() if value is not None}
    return {"format": FORMAT, **header, "arms": arms}


def write_run(run: RunFile) -> None:
    """Write a run to its path, in pytest-benchmark's format with an empty list of benchmarks."""
    content = {"datetime": datetime.now(timezone.utc).isoformat(), KEY: run_json(run), "benchmarks": []}
    write_whole(run.path, json.dumps(content, indent=1) + "\n")


def _arm_json(record: ArmRecord) -> dict[str, Any]:
    return {
        "rows": _rows_json(record.rows),
        "bugs": record.bugs,
        "ties": record.ties,
        "synthetic": record.synthetic,
        "against": record.against,
        **({"baseline": record.baseline} if record.baseline else {}),
        "lossy": record.lossy,
        "peer": record.peer,
        "rehearsal": as_dict(record.counters_run),
        "timed": record.timed,
        "options": record.options,
        "shorter": {length: _rows_json(rows) for length, rows in record.shorter.items()},
        **({"failure": record.failure} if record.failure else {}),
        **({"outputs": record.outputs} if record.outputs else {}),
        "repeated": record.repeated,
        "disturbed": record.disturbed,
        **({"captured": record.captured} if record.captured else {}),
        **({"slices": record.slices, "left_out": record.left_out} if record.slices else {}),
    }


def _rows_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    return {
        prompt: {
            "log_speedup": row.log_speedup,
            **({"logs": row.logs} if row.logs else {}),
            **({"repeat_numbers": row.repeat_numbers} if row.repeat_numbers else {}),
            "counts": as_dict(row.counts),
            "seconds": as_dict(row.seconds),
            "histograms": as_dict(row.histograms),
            **({"latencies": as_dict(row.latencies)} if row.latencies.ttft else {}),
        }
        for prompt, row in rows.items()
    }


def read(path: Path) -> RunFile:
    """Read a run file, and check each entry. The file may be cut off, of another version, or foreign.

    Raises:
        ValueError: the file is no run file, or this version cannot judge it; the message says why.
    """
    return parse(read_text(path), path)


def parse(content: str, path: Path) -> RunFile:
    """Read the text of a run file that is not on disk, such as an earlier revision. Messages name the path."""
    file = parse_json(content, path)
    try:
        head = mapping(mapping(file, "the file")[KEY], KEY)
        run = _run(head, path)
        others = [_run(mapping(other, "together"), path) for other in items(head.get("together", []), "together")]
        commit = str((file.get("commit_info") or {}).get("id", "")).removeprefix(_UNVERSIONED)[:10]
        date, reason = str(file.get("datetime", ""))[:10], str(head.get("reason", ""))
    except KeyError as error:
        raise ValueError(f"{path} is no run of `pytest --benchmark`: it has no {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be judged: {error}") from None
    return replace(run, commit=commit, date=date, reason=reason, together=others)


def _run(head: dict[str, Any], path: Path) -> RunFile:
    if head["format"] != FORMAT:
        raise ValueError(f"its format is {head['format']!r}, and this version reads {FORMAT}: measure again")
    header = _header(head)
    arms = {arm: _arm(mapping(entry, arm), header) for arm, entry in mapping(head["arms"], "arms").items()}
    for baseline in (header.baseline, *(record.baseline for record in arms.values())):
        if baseline is not None and baseline not in arms:
            raise ValueError(f"it does not have {baseline}, with which others are compared")
    return RunFile(path, header, arms)


def _header(head: dict[str, Any]) -> Header:
    identity = mapping(head["identity"], "identity")
    conditions = mapping(head["conditions"], "conditions")
    return Header(
        Identity(**{field.name: _name(identity, field.name) for field in fields(Identity)}),
        max_new_tokens=count(head, "max_new_tokens", least=1),
        outputs={prompt: str(output) for prompt, output in mapping(head["outputs"], "outputs").items()},
        floor=number(head, "floor", 0.0, MOST_LOG),
        roofline=number(head, "roofline", 0.0),
        versions=dict(mapping(head["versions"], "versions")),
        conditions={
            when: {name: str(value) for name, value in mapping(condition, when).items()}
            for when, condition in conditions.items()
        },
        # Older files lack these keys.
        baseline=text(head, "baseline") if "baseline" in head else BASELINE,
        until=number(head, "until", 0.0, 1.0) if "until" in head else None,
        budget_spent=flag(head, "budget_spent", default=False),
        left=count(head, "left") if "left" in head else 0,
        unselected=texts(head.get("unselected", []), "unselected"),
        tolerance=number(head, "tolerance", 0.0, 1.0) if "tolerance" in head else None,
        prompts={prompt: str(digest) for prompt, digest in mapping(head.get("prompts", {}), "prompts").items()},
    )


def _arm(entry: dict[str, Any], header: Header) -> ArmRecord:
    rows, options = _rows(entry["rows"], header), mapping(entry.get("options", {}), "options")
    return ArmRecord(
        rows=rows,
        bugs=count(entry, "bugs"),
        ties=count(entry, "ties"),
        synthetic=flag(entry, "synthetic"),
        against=None if entry["against"] is None else text(entry, "against"),
        baseline=text(entry, "baseline") if "baseline" in entry else None,
        lossy=flag(entry, "lossy"),
        # Older files lack the flag, and still older files lack the options.
        peer=flag(entry, "peer", default="peer" in options or lacks_our_counts(row.counts for row in rows.values())),
        counters_run=from_dict(CountersRun, _sums(entry, "rehearsal", CountersRun)),
        # Older files lack these keys.
        timed=flag(entry, "timed", default=False),
        options=options,
        shorter={
            _length(length): _rows(shorter, header)
            for length, shorter in mapping(entry.get("shorter", {}), "shorter").items()
        },
        failure=text(entry, "failure") if "failure" in entry else "",
        outputs={prompt: str(output) for prompt, output in mapping(entry.get("outputs", {}), "outputs").items()},
        repeated=count(entry, "repeated") if "repeated" in entry else 0,
        disturbed=count(entry, "disturbed") if "disturbed" in entry else 0,
        captured=count(entry, "captured") if "captured" in entry else 0,
        slices=count(entry, "slices") if "slices" in entry else 0,
        left_out=count(entry, "left_out") if "left_out" in entry else 0,
    )


def _length(key: str) -> int:
    """Return the length of outputs that a key stands for. Keys are text."""
    if not re.fullmatch("[1-9][0-9]{0,9}", key):
        raise ValueError(f"shorter has {key[:20]!r}, which is no length")
    return int(key)


def _rows(rows: Any, header: Header) -> dict[str, Row]:
    by_prompt = mapping(rows, "rows")
    if unknown := by_prompt.keys() - header.outputs.keys():
        raise ValueError(f"it has times of a prompt that it does not list, {min(unknown)!r}")
    return {prompt: _row(mapping(row, prompt)) for prompt, row in by_prompt.items()}


def _row(row: dict[str, Any]) -> Row:
    sums = _sums(row, "counts", RowCounts)
    if "nll" in sums:
        number(sums, "nll", 0.0, MOST_NATS * sums["tokens"])
    logs = [number({"logs": log}, "logs", -MOST_LOG, MOST_LOG) for log in items(row.get("logs", []), "logs")]
    repeat_numbers = counts(row.get("repeat_numbers", []), "repeat_numbers")
    repeats = max(1, len(logs))
    if repeat_numbers and not len(repeat_numbers) == len(set(repeat_numbers)) == repeats:
        raise ValueError(f"repeat_numbers is {repeat_numbers}, which does not number {repeats} repeat(s)")
    return Row(
        log_speedup=number(row, "log_speedup", -MOST_LOG, MOST_LOG),
        counts=from_dict(RowCounts, sums),
        seconds=from_dict(RowSeconds, _sums(row, "seconds", RowSeconds)),
        histograms=histograms_in(row),
        latencies=latencies_in(row),
        logs=logs,
        repeat_numbers=repeat_numbers,
    )


def _sums(entry: dict[str, Any], key: str, kind: type[RowCounts | RowSeconds | CountersRun]) -> dict[str, float]:
    """Return sums of counts or of seconds, each at least its field's bound. Names of other versions are left out."""
    values = mapping(entry[key], key)
    return {
        field.name: number(values, field.name, field.metadata.get("least", 0.0))
        for field in fields(kind)
        if field.name in values or field.default is MISSING
    }


def _name(values: dict[str, Any], name: str) -> str:
    """Return a text of the identity. Parts of a file's path must be slugs, which cannot lead to another folder."""
    value = text(values, name)
    if name in ("hardware", "dtype", "preset") and value != slug(value):
        raise ValueError(f"{name} is {value!r}, which is no name")
    return value
