"""The perplexity of a corpus, from the log-probabilities of its tokens, as a metric for `evaluate`."""

from __future__ import annotations

import datasets
import evaluate
import torch

from specdecode.evals.metrics._info import metric_info
from specdecode.evals.perplexity import perplexity


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """A metric: compute(predictions=log p of the tokens of each document, in nats) returns "perplexity", exp(sum of NLL
    / tokens)."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, predictions=datasets.Sequence(datasets.Value("float64")))

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        losses = [-torch.tensor(document, dtype=torch.float64) for document in predictions]
        return {"perplexity": perplexity(losses)}
