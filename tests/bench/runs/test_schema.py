"""The schemas of files, against files of this and of older versions, and against the reader."""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from jsonschema import Draft202012Validator

from specdecode.bench.runs.counts import as_dict
from specdecode.bench.runs.file import parse, run_json
from specdecode.bench.runs.measures import Measures
from specdecode.bench.runs.records import ArmRecord, Header, RunFile
from specdecode.bench.runs.schema import run_schema
from specdecode.evals.results import QualityRun
from specdecode.evals.results_file import read as read_quality
from specdecode.evals.results_file import write as write_quality
from specdecode.evals.schema import quality_schema
from specdecode.support.checked import LEAST_SECONDS
from tests.helpers.command_line import exit_code
from tests.helpers.damage import GONE, edited, places
from tests.helpers.quality_runs import whole_quality_run
from tests.helpers.root import ROOT
from tests.helpers.run_contents import SPEEDUPS, run_content
from tests.helpers.speed_runs import content, whole_sweep

SCHEMAS: dict[str, dict[str, Any]] = {
    "run": run_schema(),
    "baseline": run_schema(baseline=True),
    "quality": quality_schema(),
}
BASELINES = [file for file in (ROOT / "baselines").glob("*/*.json") if file.parent.name != "quality"]
ARM = ("specdecode", "arms", "linear")
ROW = (*ARM, "rows", "text/0")


def valid(kind: str, document: Any) -> bool:
    return bool(Draft202012Validator(SCHEMAS[kind]).is_valid(document))


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every part of a schema that describes an object with named keys."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


def filled(hint: Any) -> Any:
    """Return a value of a type in which nothing is empty, so that no key is omitted from a file."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        hints = get_type_hints(hint)
        return hint(**{field.name: filled(hints[field.name]) for field in fields(hint)})
    if get_origin(hint) is types.UnionType:
        return filled(get_args(hint)[0])
    if get_origin(hint) is dict:
        keys, values = get_args(hint)
        return {7 if keys is int else "key": filled(values)}
    if get_origin(hint) is list:
        return [filled(get_args(hint)[0])]
    return {float: 1.0, int: 1, str: "text", bool: True, Any: 1}[hint]


@pytest.mark.parametrize("kind", list(SCHEMAS))
def test_a_schema_is_one_and_tells_all(kind: str) -> None:
    """Guards against keys without a description, and against an invalid schema, which checks nothing."""
    schema = SCHEMAS[kind]
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"specdecode:{kind}:{1 if kind == 'quality' else 3}"
    named = [(key, value) for part in objects(schema) for key, value in part["properties"].items()]
    assert len(named) > 40
    told = {key for key, value in named if value.get("title") and len(value.get("description", "")) > 10}
    assert {key for key, _ in named} - told <= {"specdecode", "quality", "group", "extra_info"}


@pytest.mark.parametrize(
    "file", [*BASELINES, *(ROOT / "tests" / "data" / f"{name}.json" for name in ("run", "baseline"))]
)
def test_files_of_before_are_valid(file: Path) -> None:
    """Guards against a schema that rejects older files which this version still reads."""
    document = json.loads(file.read_text())
    assert valid("run", document)
    assert valid("baseline", document) == ("reason" in document["specdecode"])
    assert len(BASELINES) >= 1


def test_files_of_now_are_valid() -> None:
    """Guards against a schema that rejects this version's own files."""
    for document in (run_content(SPEEDUPS), json.loads(content(whole_sweep()))):
        assert valid("run", document)
    assert valid("quality", json.loads(write_quality(whole_quality_run())))


def test_the_schema_has_the_keys_that_are_written_and_no_others() -> None:
    """Guards against a field that is written and not described, or described and not written."""
    header, record = filled(Header), filled(ArmRecord)
    run = RunFile(Path(), header, {"arm": record})
    written = {
        "specdecode": {**json.loads(json.dumps(run_json(run))), "together": [], "reason": "why"},
        "benchmarks": [{"group": "speed", "extra_info": as_dict(filled(Measures))}],
    }
    quality = json.loads(write_quality(filled(QualityRun)))
    for kind, document in (("run", written), ("quality", quality)):
        exact = copy.deepcopy(SCHEMAS[kind])
        for part in objects(exact):
            if part.get("type") == "object":
                part |= {"additionalProperties": False, "required": list(part["properties"])}
        exact["required"] = [kind.replace("run", "specdecode")]
        errors = [
            f"{error.json_path}: {error.message}"
            for error in Draft202012Validator(exact).iter_errors(document)
            if error.validator in ("additionalProperties", "required")
        ]
        assert not errors


def test_what_the_reader_needs_the_schema_needs() -> None:
    """Guards against a valid file that the reader rejects for a missing key, and the other way round."""
    document = run_content(SPEEDUPS, reason="why")
    document["specdecode"]["arms"]["linear"]["shorter"] = {"20": document["specdecode"]["arms"]["linear"]["rows"]}
    document["specdecode"]["baseline"] = "ar"
    looked_at = [
        path
        for path in places(document)
        if path[:3] in ((*ARM,), ("specdecode",)) or (path[0] == "specdecode" and path[1] != "arms")
    ]
    asked = 0
    for path in looked_at:
        lacking = edited(document, [(path, GONE)])
        if (path[1:2] == ("outputs",) and len(path) == 3) or path == ARM:  # names that rows and peers refer to
            continue
        assert valid("run", lacking) == reads(lacking), path
        asked += not reads(lacking)
    assert asked > 20
    assert len(looked_at) > 2 * asked


def reads(document: Any) -> bool:
    try:
        parse(json.dumps(document), Path("run.json"))
    except ValueError:
        return False
    return True


DAMAGES: list[tuple[tuple[Any, ...], Any]] = [
    (("specdecode", "format"), 2),
    (("specdecode", "identity", "hardware"), "../../etc"),
    (("specdecode", "max_new_tokens"), 0),
    (("specdecode", "max_new_tokens"), 1.5),
    (("specdecode", "floor"), -0.1),
    (("specdecode", "floor"), 21),
    (("specdecode", "roofline"), None),
    (("specdecode", "arms"), []),
    ((*ARM, "bugs"), -1),
    ((*ARM, "bugs"), "no"),
    ((*ARM, "lossy"), "no"),
    ((*ARM, "against"), 3),
    ((*ARM, "rehearsal"), {"peak_bytes": -1}),
    ((*ARM, "shorter"), {"x": {}}),
    ((*ROW, "log_speedup"), 21),
    ((*ROW, "log_speedup"), True),
    ((*ROW, "counts", "tokens"), 0),
    ((*ROW, "counts", "drafted"), -1),
    ((*ROW, "counts", "drafted"), None),
    ((*ROW, "counts", "steps"), 1e16),
    ((*ROW, "seconds", "total"), LEAST_SECONDS / 2),
    ((*ROW, "seconds", "draft"), -1.0),
    ((*ROW, "histograms", "accepted"), [1, -1]),
    ((*ROW, "histograms", "accepted"), [0.5]),
]


@pytest.mark.parametrize(("path", "value"), DAMAGES, ids=lambda value: str(value)[-40:])
def test_damage_is_found_by_schema_and_reader(path: tuple[Any, ...], value: Any) -> None:
    """Guards against a bound that only the schema or only the reader checks."""
    document = run_content(SPEEDUPS)
    assert valid("run", document)
    assert reads(document)
    damaged = edited(document, [(path, value)])
    assert damaged != document
    assert not valid("run", damaged)
    assert not reads(damaged)


QUALITY_DAMAGES: list[Callable[[dict[str, Any]], Any]] = [
    lambda run: run.update(format=2),
    lambda run: run["header"].pop("target"),
    lambda run: run["header"].update(k=0),
    lambda run: run["header"].update(window=0),
    lambda run: run["documents"][0].update(id=3),
    lambda run: run["documents"][0]["reference"].__setitem__(0, -1.0),
    lambda run: run["needles"][0].update(depth=1.5),
    lambda run: run["needles"][0].update(ranks=[-1]),
    lambda run: run.pop("documents"),
]


@pytest.mark.parametrize("damage", QUALITY_DAMAGES)
def test_damage_of_quality_is_found_by_schema_and_reader(
    damage: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    """Guards against a bound that only the schema or only the reader checks."""
    document, file = json.loads(write_quality(whole_quality_run())), tmp_path / "run.json"
    damage(document["quality"])
    assert not valid("quality", document)
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"run\.json"):
        read_quality(file)


def test_further_keys_are_no_damage() -> None:
    """Guards against programs that break at the first key that a later version adds."""
    document = run_content(SPEEDUPS)
    for path in ((), ("specdecode",), ("specdecode", "identity"), ARM, ROW, (*ROW, "counts"), (*ROW, "seconds")):
        place = document
        for key in path:
            place = place[key]
        place["of later"] = "unknown"
    assert valid("run", document)
    assert reads(document)


@pytest.mark.parametrize("kind", list(SCHEMAS))
def test_the_command_line_prints_schemas(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a schema that other programs cannot get."""
    assert exit_code(monkeypatch, "schema", kind) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMAS[kind]
