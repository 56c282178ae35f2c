"""Run files: pytest-benchmark's own JSON with what a gate needs in it, written by the suite and read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import REHEARSED, ArmRecord, Header, Identity, Row, RunFile
from specdecode.support.files import slug

FORMAT = 3
KEY = "specdecode"

# No run is faster or slower than another by more than this, in logarithms: what says so is damaged.
_MOST_LOG = 20.0


def run_json(run: RunFile) -> dict[str, Any]:
    """The run as it stands in the file, under the key "specdecode": all arms that were measured, also those whose tests
    were not selected, for others are compared with them."""
    return {"format": FORMAT, **asdict(run.header), "arms": {arm: asdict(record) for arm, record in run.arms.items()}}


def read(path: Path) -> RunFile:
    """A run file, checked entry by entry: it may be cut off, of another version, or somebody else's.

    Raises:
        ValueError: it is not a run file that this version can judge; the sentence says why.
    """
    return parse(read_text(path), path)


def parse(text: str, path: Path) -> RunFile:
    """The same for the text of a file that is not on disk, an earlier revision; the path names it."""
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
                when: {name: str(told) for name, told in of.items()} for when, of in head["conditions"].items()
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
    return ArmRecord(
        rows=_rows(entry["rows"], header),
        bugs=int(_number(entry, "bugs")),
        ties=int(_number(entry, "ties")),
        synthetic=bool(entry["synthetic"]),
        against=None if entry["against"] is None else str(entry["against"]),
        lossy=bool(entry["lossy"]),
        rehearsal={name: _number(entry["rehearsal"], name) for name in REHEARSED if name in entry["rehearsal"]},
        # Older files do not have these.
        timed=bool(entry.get("timed", False)),
        options=dict(entry.get("options", {})),
        shorter={int(length): _rows(rows, header) for length, rows in entry.get("shorter", {}).items()},
    )


def _rows(rows: Any, header: Header) -> dict[str, Row]:
    if unknown := rows.keys() - header.outputs.keys():
        raise ValueError(f"it has times of a prompt that it does not list, {min(map(str, unknown))!r}")
    return {str(prompt): _row(row) for prompt, row in rows.items()}


def _row(row: Any) -> Row:
    return Row(
        log_speedup=_log(row, "log_speedup"),
        counts=_positive(row["counts"], "runs", "tokens", "steps"),
        seconds=_positive(row["seconds"], "total", "ttft"),
        histograms={
            str(of): [int(_number(steps, i)) for i in range(len(steps))] for of, steps in row["histograms"].items()
        },
    )


def _positive(values: Mapping[str, Any], *needed: str) -> dict[str, float]:
    """Sums of counts or seconds: none is negative, and those that others are divided by are there and not nought."""
    found = {str(name): _number(values, name) for name in {*needed, *values}}
    if wrong := [name for name, value in found.items() if value < 0 or (value == 0 and name in needed)]:
        raise ValueError(f"{wrong[0]} is {found[wrong[0]]!r}, which cannot be")
    return found


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
