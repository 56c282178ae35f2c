"""`specdecode schema`: print the JSON Schemas of files, for programs that read them."""

from __future__ import annotations

import enum
import json
from typing import Annotated

import typer

from specdecode.cli.output import say


class Kind(str, enum.Enum):
    run = "run"
    baseline = "baseline"
    quality = "quality"


def schema(
    kind: Annotated[Kind, typer.Argument(help="kind of file: a run of speeds, a blessed run, or a run of quality")],
) -> None:
    """Print the JSON Schema (2020-12) of a kind of file: each key with its meaning, unit and bounds."""
    from specdecode.bench.runs.schema import run_schema
    from specdecode.evals.schema import quality_schema

    content = quality_schema() if kind is Kind.quality else run_schema(baseline=kind is Kind.baseline)
    say(json.dumps(content, indent=2, ensure_ascii=False))
