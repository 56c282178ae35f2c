"""What `evaluate` asks of each metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


def metric_info(metric: evaluate.Metric, **features: Any) -> evaluate.MetricInfo:
    """Return a metric's docstring, and the features of its inputs by name, in the form of `evaluate`."""
    inputs = datasets.Features(features)
    return evaluate.MetricInfo(description=str(metric.__doc__), citation="", inputs_description="", features=inputs)
