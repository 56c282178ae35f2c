"""The share of functions that pass the tests of their problem: HumanEval's measure, as a metric for `evaluate`."""

from __future__ import annotations

import datasets
import evaluate

from specdecode.evals.intervals import wilson
from specdecode.evals.metrics._info import metric_info
from specdecode.evals.tasks import TASKS


class PassAt1(evaluate.Metric):  # type: ignore[misc]
    """A metric: compute(predictions=completions, references=rows of HumanEval) returns "pass@1" and its 95 % interval.
    The programs run in a contained process, see `specdecode.evals.sandbox.contained`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return metric_info(self, predictions=text, references=dict.fromkeys(TASKS["humaneval"].fields, text))

    def _compute(self, predictions: list[str], references: list[dict[str, str]]) -> dict[str, float]:
        mark = TASKS["humaneval"].mark
        right = [not mark(row, answer) for answer, row in zip(predictions, references, strict=True)]
        share = wilson(sum(right), len(right))
        return {"pass@1": share.value, "low": share.low, "high": share.high}
