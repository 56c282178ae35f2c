"""Run files: pytest-benchmark's own JSON with what a gate needs in it, written by the suite and read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from specdecode.bench.runs.counts import Histograms, RowCounts, RowSeconds, as_dict, from_dict
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row, RunFile, lacks_our_counts
from specdecode.support.files import slug

FORMAT = 3
KEY = "specdecode"

# No run is faster or slower than another by more than this, in logarithms: what says so is damaged.
_MOST_LOG = 20.0


def run_json(run: RunFile) -> dict[str, Any]:
    """Return what stands in the file under the key "specdecode".

    All arms that were measured are there, also those whose tests were not selected: others are compared with them.
    """
    arms = {arm: _arm_json(record) for arm, record in run.arms.items()}
    return {"format": FORMAT, **asdict(run.header), "arms": arms}


def _arm_json(record: ArmRecord) -> dict[str, Any]:
    return {
        "rows": _rows_json(record.rows),
        "bugs": record.bugs,
        "ties": record.ties,
        "synthetic": record.synthetic,
        "against": record.against,
        "lossy": record.lossy,
        "peer": record.peer,
        "rehearsal": as_dict(record.counters_run),
        "timed": record.timed,
        "options": record.options,
        "shorter": {length: _rows_json(rows) for length, rows in record.shorter.items()},
    }


def _rows_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    return {
        prompt: {
            "log_speedup": row.log_speedup,
            "counts": as_dict(row.counts),
            "seconds": as_dict(row.seconds),
            "histograms": as_dict(row.histograms),
        }
        for prompt, row in rows.items()
    }


def read(path: Path) -> RunFile:
    """Read a run file, checked entry by entry: it may be cut off, of another version, or somebody else's.

    Raises:
        ValueError: it is not a run file that this version can judge; the sentence says why.
    """
    return parse(read_text(path), path)


def parse(text: str, path: Path) -> RunFile:
    """Read the text of a run file that is not on disk, an earlier revision; the path names it."""
    content = parse_json(text, path)
    try:
        head = content[KEY]
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {head['format']!r}, and this version reads {FORMAT}: measure again")
        header = Header(
            Identity(**{field.name: _text(head["identity"], field.name) for field in fields(Identity)}),
            max_new_tokens=int(_number(head, "max_new_tokens")),
            outputs={str(prompt): str(output) for prompt, output in head["outputs"].items()},
            floor=_log(head, "floor"),
            roofline=_number(head, "roofline"),
            versions=dict(head["versions"]),
            conditions={
                when: {name: str(value) for name, value in condition.items()}
                for when, condition in head["conditions"].items()
            },
        )
        arms = {str(arm): _arm(entry, header) for arm, entry in head["arms"].items()}
        commit = str(content.get("commit_info", {}).get("id", ""))[:10]
        date, reason = str(content.get("datetime", ""))[:10], str(head.get("reason", ""))
    except KeyError as error:
        raise ValueError(f"{path} is no run of `pytest --benchmark`: it has no {error}") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} cannot be judged: {error}") from None
    if BASELINE not in arms:
        raise ValueError(f"{path} cannot be judged: it does not have {BASELINE}, which all else is compared with")
    return RunFile(path, header, arms, commit, date, reason)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not whole: it is no text; measure again") from None


def parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is not whole: it is no JSON; measure again") from None


def _arm(entry: Any, header: Header) -> ArmRecord:
    rows, options = _rows(entry["rows"], header), dict(entry.get("options", {}))
    return ArmRecord(
        rows=rows,
        bugs=int(_number(entry, "bugs")),
        ties=int(_number(entry, "ties")),
        synthetic=bool(entry["synthetic"]),
        against=None if entry["against"] is None else str(entry["against"]),
        lossy=bool(entry["lossy"]),
        # Older files do not have the flag, and still older ones no options.
        peer=bool(entry.get("peer", "peer" in options or lacks_our_counts(rows))),
        counters_run=_counters_run(entry["rehearsal"]),
        # Older files do not have these.
        timed=bool(entry.get("timed", False)),
        options=options,
        shorter={int(length): _rows(shorter, header) for length, shorter in entry.get("shorter", {}).items()},
    )


def _counters_run(values: Any) -> CountersRun:
    counted = [field.name for field in fields(CountersRun) if field.name in values]
    return CountersRun(**{name: _number(values, name) for name in counted})


def _rows(rows: Any, header: Header) -> dict[str, Row]:
    if unknown := rows.keys() - header.outputs.keys():
        raise ValueError(f"it has times of a prompt that it does not list, {min(map(str, unknown))!r}")
    return {str(prompt): _row(row) for prompt, row in rows.items()}


def _row(row: Any) -> Row:
    return Row(
        log_speedup=_log(row, "log_speedup"),
        counts=from_dict(RowCounts, _sums(row["counts"], "runs", "tokens", "steps")),
        seconds=from_dict(RowSeconds, _sums(row["seconds"], "total", "ttft")),
        histograms=from_dict(
            Histograms,
            {name: [int(_number(steps, i)) for i in range(len(steps))] for name, steps in row["histograms"].items()},
        ),
    )


def _sums(values: Mapping[str, Any], *needed: str) -> dict[str, float]:
    """Check sums of counts or seconds: none is negative, and those that others are divided by are above nought."""
    sums = {str(name): _number(values, name) for name in {*needed, *values}}
    if wrong := [name for name, value in sums.items() if value < 0 or (value == 0 and name in needed)]:
        raise ValueError(f"{wrong[0]} is {sums[wrong[0]]!r}, which cannot be")
    return sums


def _number(values: Any, name: Any) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, which is no number")
    return float(value)


def _log(values: Any, name: str) -> float:
    value = _number(values, name)
    if abs(value) > _MOST_LOG:
        raise ValueError(f"{name} is {value!r}, which cannot be")
    return value


def _text(values: Any, name: str) -> str:
    value = values[name]
    # These name files: nothing in them may lead elsewhere.
    if not isinstance(value, str) or (name in ("hardware", "dtype", "preset") and value != slug(value)):
        raise ValueError(f"{name} is {value!r}, which is no name")
    return value
