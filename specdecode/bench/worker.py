"""One version of this package in a process of its own, measuring on demand: `python -m specdecode.bench.worker`.

Requests come as JSON objects, one a line, on the standard input, and each is answered by one line on the standard
output. Versions talk to each other through this, so the requests change only together with `side_by_side.PROTOCOL`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from specdecode.bench.arms.arm import Arm, make_arm
from specdecode.bench.measure.bandwidth import roofline_throughput
from specdecode.bench.measure.check import classify
from specdecode.bench.measure.counters import counters_run
from specdecode.bench.measure.experiment import timed
from specdecode.bench.measure.header import run_versions
from specdecode.bench.measure.side_by_side import PROTOCOL
from specdecode.bench.runs.counts import as_dict
from specdecode.core.errors import SpecDecodeError
from specdecode.evals.data import token_prompts
from specdecode.models.lm import LM
from specdecode.models.loading import load


class Worker:
    """Serve requests on the models of one version and its arms of a preset: each method is a request.

    `WorkerProcess` of another version asks, so names, arguments and answers stay: "rehearse" asks for the counters run.
    """

    def __init__(self) -> None:
        self._target: LM | None = None
        self._arms: dict[str, Arm] = {}

    def load(
        self,
        target: str,
        draft: str,
        device: str | None,
        dtype: str | None,
        backend: str,
        arms: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """Load the models and make the arms; say what this version is, and which arms it cannot make and why."""
        self._target = load(target, device=device, dtype=dtype, backend="eager")
        smaller = None
        if draft:
            smaller = load(
                draft, device=device, dtype=dtype, target=self._target, same_vocabulary=False, backend="eager"
            )
        refused = {}
        for name, options in arms.items():
            try:
                self._arms[name] = make_arm(name, options, self._target, smaller, backend)
            except (SpecDecodeError, ValueError) as error:
                refused[name] = str(error)
        chosen = self._target.with_backend(backend).backend
        return {
            "protocol": PROTOCOL,
            "backend": str(chosen),
            "versions": run_versions(target, chosen.name),
            "refused": refused,
            "about": {
                name: {
                    "synthetic": arm.synthetic,
                    "against": arm.against,
                    "lossy": arm.lossy,
                    "timed": arm.timed,
                    "peer": arm.peer,
                }
                for name, arm in self._arms.items()
            },
            "pair": f"{self._target.name}{f' with {smaller.name}' if smaller else ''}",
            "device": str(self._target.device),
        }

    def unload(self) -> None:
        """Give the memory back."""
        self._target, self._arms = None, {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def prompts(self, spec: str) -> list[Any]:
        """Return token prompts by id, and their origins."""
        return list(token_prompts(spec, self._loaded))

    def roofline(self) -> float:
        return roofline_throughput(self._loaded)

    def rehearse(self, arm: str, prompt: list[int], length: int, expected: list[int]) -> dict[str, float]:
        return as_dict(counters_run(self._arms[arm], prompt, length, expected))

    def expected(self, arm: str, prompt: list[int], tokens: list[int]) -> list[int]:
        """Return what the arm must write, where `ar` wrote these tokens."""
        return list(self._arms[arm].expected(prompt, tokens, len(tokens)))

    def run(self, arm: str, prompt: list[int], length: int, expected: list[int]) -> dict[str, Any]:
        return timed(self._arms[arm], prompt, length, expected).as_json()

    def check(self, arm: str, prompt: list[int], expected: list[int], got: list[int]) -> str:
        return classify(self._arms[arm].target, prompt, expected, got, self._arms[arm].policy)

    @property
    def _loaded(self) -> LM:
        assert self._target is not None
        return self._target


def serve(requests: Iterable[str]) -> Iterator[str]:
    """Answer requests, as long as there are any."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"value": getattr(worker, request.pop("do"))(**request)}
        except torch.OutOfMemoryError:
            worker.unload()
            answer = {"error": "its memory is too small", "memory": True}
        except (SpecDecodeError, ValueError) as error:
            answer = {"error": str(error)}
        yield json.dumps(answer)


def main() -> None:
    """Keep the standard output for answers: what libraries print goes to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for answer in serve(sys.stdin):
            answers.write(answer + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
