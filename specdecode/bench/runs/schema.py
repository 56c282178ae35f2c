"""The JSON Schema of run files and of baselines, made of the dataclasses that they hold."""

from __future__ import annotations

from specdecode.bench.runs.file import FORMAT, KEY, MOST_LOG
from specdecode.bench.runs.measures import Measures
from specdecode.bench.runs.records import ArmRecord, Header, Identity, Row
from specdecode.support.checked import MOST
from specdecode.support.files import SLUG
from specdecode.support.json_schema import DIALECT, Definitions, Form, Schema, format_entry

_FORMS = {
    Identity: Form(patterns=dict.fromkeys(("hardware", "dtype", "preset"), SLUG)),
    Header: Form(
        required=("roofline", "versions", "conditions"),
        bounds={"floor": (0, MOST_LOG), "max_new_tokens": (1, MOST), "until": (0, 1)},
    ),
    # Keys that came later are optional: files of before lack them.
    ArmRecord: Form(
        keys={"counters_run": "rehearsal"},
        required=("bugs", "ties", "synthetic", "against", "lossy", "counters_run"),
        nullable=("against",),
    ),
    Row: Form(required=("histograms",), bounds=dict.fromkeys(("log_speedup", "logs"), (-MOST_LOG, MOST_LOG))),
    Measures: Form(flat=True),
}


def run_schema(baseline: bool = False) -> Schema:
    """Return the schema of a run file: pytest-benchmark's, of which it describes what this package writes and reads.

    Args:
        baseline: of a blessed run, which has the reason too.
    """
    definitions = Definitions(_FORMS)
    run = definitions.object(Header) | {"title": "Run"}
    run["properties"] = {
        "format": format_entry(FORMAT),
        **run["properties"],
        "arms": {
            "title": "Arms",
            "description": "Results of each arm, by its name. Arms are ways to decode.",
            "type": "object",
            "additionalProperties": definitions.refer(ArmRecord),
        },
        "together": {
            "title": "Together",
            "description": "Of a baseline: runs of the same on other machines of its hardware, by which times are"
            " judged, too. Each is as this object is.",
            "type": "array",
            "items": {"$ref": f"#/properties/{KEY}"},
        },
        "reason": {
            "title": "Reason",
            "description": "Why the run was blessed as the baseline. Runs that are no baseline have none.",
            "type": "string",
        },
    }
    run["required"] = ["format", *run["required"], "arms", *(["reason"] if baseline else [])]
    kind = "baseline" if baseline else "run"
    return {
        "$schema": DIALECT,
        "$id": f"specdecode:{kind}:{FORMAT}",
        "title": f"{kind.capitalize()} of specdecode, format {FORMAT}",
        "description": f'What `pytest --benchmark` adds to the JSON file of pytest-benchmark: the key "{KEY}", the'
        ' measures in "extra_info", and what is read of the other keys. pytest-benchmark describes the rest.',
        "type": "object",
        "required": [KEY],
        "properties": {
            **_of_pytest_benchmark(definitions.refer(Measures)),
            KEY: run,
        },
        "$defs": definitions.schemas,
    }


def _of_pytest_benchmark(measures: Schema) -> dict[str, Schema]:
    """Return the schemas of what is read of pytest-benchmark's own keys, and of the measures below them."""
    return {
        "datetime": {
            "title": "Datetime",
            "description": "When the file was written, by ISO 8601.",
            "type": "string",
        },
        "commit_info": {
            "title": "Commit info",
            "description": "The commit that was measured.",
            "type": "object",
            "properties": {
                "id": {"title": "Id", "description": "Hash of the commit."},
                "dirty": {"title": "Dirty", "description": "Whether there were changes that were not committed."},
            },
        },
        "benchmarks": {
            "title": "Benchmarks",
            "description": 'One entry for each selected test; those of the group "speed" are this package\'s.',
            "type": "array",
            "items": {
                "if": {"properties": {"group": {"const": "speed"}}, "required": ["group"]},
                "then": {"properties": {"extra_info": measures}},
            },
        },
    }
