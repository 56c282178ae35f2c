"""The share of answers with the reference's last number: GSM8K's measure, as a metric for `evaluate`."""

from __future__ import annotations

import datasets
import evaluate

from specdecode.evals.intervals import wilson
from specdecode.evals.metrics._info import metric_info
from specdecode.evals.tasks import TASKS


class ExactMatchNumber(evaluate.Metric):  # type: ignore[misc]
    """A metric: compute(predictions=answers, references=GSM8K's "answer" fields) returns "exact_match" and its 95 %
    interval."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return metric_info(self, predictions=text, references=text)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        mark = TASKS["gsm8k"].mark
        right = [not mark({"answer": row}, answer) for answer, row in zip(predictions, references, strict=True)]
        share = wilson(sum(right), len(right))
        return {"exact_match": share.value, "low": share.low, "high": share.high}
