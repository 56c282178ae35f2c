"""The JSON Schema of run files and of baselines, built from their dataclasses."""

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
        bounds={"floor": (0, MOST_LOG), "max_new_tokens": (1, MOST), "until": (0, 1), "tolerance": (0, 1)},
    ),
    # Keys that were added later are optional, because older files lack them.
    ArmRecord: Form(
        keys={"counters_run": "rehearsal"},
        required=("bugs", "ties", "synthetic", "against", "lossy", "counters_run"),
        nullable=("against",),
    ),
    Row: Form(required=("histograms",), bounds=dict.fromkeys(("log_speedup", "logs"), (-MOST_LOG, MOST_LOG))),
    Measures: Form(flat=True),
}


def run_schema(baseline: bool = False) -> Schema:
    """Return the schema of a run file: the keys of pytest-benchmark's file that this package writes or reads.

    Args:
        baseline: whether to describe a blessed run, which also has the reason.
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
            "description": "In a baseline: runs of the same models, prompts and lengths on other machines of this"
            " hardware. Times are judged by them too. Each has the form of this object.",
            "type": "array",
            "items": {"$ref": f"#/properties/{KEY}"},
        },
        "reason": {
            "title": "Reason",
            "description": "Why the run was blessed as the baseline. Other runs have no reason.",
            "type": "string",
        },
    }
    run["required"] = ["format", *run["required"], "arms", *(["reason"] if baseline else [])]
    kind = "baseline" if baseline else "run"
    return {
        "$schema": DIALECT,
        "$id": f"specdecode:{kind}:{FORMAT}",
        "title": f"{kind.capitalize()} of specdecode, format {FORMAT}",
        "description": f'Additions of `pytest --benchmark` to the JSON file of pytest-benchmark: the key "{KEY}" and'
        ' the measures in "extra_info". Also the other keys that are read. pytest-benchmark describes the rest.',
        "type": "object",
        "required": [KEY],
        "properties": {
            **_of_pytest_benchmark(definitions.refer(Measures)),
            KEY: run,
        },
        "$defs": definitions.schemas,
    }


def _of_pytest_benchmark(measures: Schema) -> dict[str, Schema]:
    """Return the schemas of pytest-benchmark's own keys that are read, and of the measures below them."""
    return {
        "datetime": {
            "title": "Datetime",
            "description": "Time of writing the file, in ISO 8601.",
            "type": "string",
        },
        "commit_info": {
            "title": "Commit info",
            "description": "The measured commit.",
            "type": "object",
            "properties": {
                "id": {"title": "Id", "description": "Hash of the commit."},
                "dirty": {"title": "Dirty", "description": "Whether there were uncommitted changes."},
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
