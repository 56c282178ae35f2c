"""The JSON Schema of the quality suite's files, built from the dataclasses in them."""

from __future__ import annotations

from specdecode.evals.results import Document, NeedleTrial, QualityHeader, QualityRun, TasksHeader, Trace
from specdecode.evals.results_file import FORMAT, KEY, LEAST_NATS
from specdecode.support.checked import MOST
from specdecode.support.json_schema import DIALECT, Definitions, Form, Schema, format_entry

_COUNT, _NATS = (1, MOST), (LEAST_NATS, MOST)
_FORMS = {
    TasksHeader: Form(bounds={"max_new_tokens": _COUNT}),
    # Older files have no tasks.
    QualityHeader: Form(
        optional=("tasks",),
        nullable=("tasks", "window", "stride"),
        bounds={"k": _COUNT, "window": _COUNT, "stride": _COUNT},
    ),
    Document: Form(bounds={"reference": _NATS}),
    Trace: Form(bounds={"nll": _NATS, "kl": _NATS}),
    NeedleTrial: Form(bounds={"length": _COUNT, "depth": (0, 1), "logprob": (-MOST, -LEAST_NATS)}),
}


def quality_schema() -> Schema:
    """Return the schema of a run of the quality suite."""
    definitions = Definitions(_FORMS)
    run = definitions.object(QualityRun)
    run["properties"] = {"format": format_entry(FORMAT), **run["properties"]}
    run["required"].insert(0, "format")
    datetime = run["properties"].pop("datetime")
    return {
        "$schema": DIALECT,
        "$id": f"specdecode:quality:{FORMAT}",
        "title": f"Quality run of specdecode, format {FORMAT}",
        "description": "A run that `pytest --quality` writes.",
        "type": "object",
        "required": [KEY],
        "properties": {"datetime": datetime, KEY: run},
        "$defs": definitions.schemas,
    }
