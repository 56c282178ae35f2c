"""Metrics for `evaluate`: scripts that it loads from this folder, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def metric(name: str) -> Any:
    """Load a metric with `evaluate.load`: "exact_match_number", "pass_at_1" or "perplexity".

    Raises:
        ValueError: no such metric, or `evaluate` is not installed.
    """
    scripts = {file.stem: str(file) for file in Path(__file__).parent.glob("[!_]*.py")}
    if name not in scripts:
        raise ValueError(f"no metric is named {name!r}: choose from {', '.join(sorted(scripts))}")
    try:
        import evaluate
    except ImportError as error:
        raise ValueError(f"metrics need evaluate ({error}): pip install 'specdecode[quality]'") from error
    return evaluate.load(scripts[name])
