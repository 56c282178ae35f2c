"""A process that measures one version of a repository on request: `python -m specdecode.bench.worker`.

Each line of the standard input is a request, a JSON object. Each is answered by one line on the standard output.
Different versions use this protocol with each other, so a change of requests needs a new `versions.PROTOCOL`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import NO_MEMORY, ArmError, ModelNames, below
from specdecode.bench.arms.models import Models, load_models
from specdecode.bench.arms.slices import sliced
from specdecode.bench.measure.bandwidth import roofline_of
from specdecode.bench.measure.check import check
from specdecode.bench.measure.counters import counters_run
from specdecode.bench.measure.header import run_versions
from specdecode.bench.measure.timed import timed
from specdecode.bench.measure.versions import PROTOCOL
from specdecode.bench.runs.counts import as_dict
from specdecode.core.errors import SpecDecodeError
from specdecode.evals.data import token_prompts
from specdecode.models.devices import choose_device
from specdecode.models.loading import choose_dtype, dtype_name


class Worker:
    """The models and arms of one version. Each public method is a request.

    A `WorkerProcess` of another version sends the requests, so names, arguments and answers must not change: the
    request for the counters run is still named "rehearse".

    Args:
        pause: tells the other side that a slice has ended, and returns when the next one may begin.
    """

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause
        self._models: Models | None = None
        self._arms: dict[str, Arm] = {}
        self._prompts: dict[str, list[int]] = {}

    def load(
        self,
        target: str,
        draft: str,
        device: str | None,
        dtype: str | None,
        backend: str,
        arms: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """Load the models and build the arms. Return facts about this version, and the reasons for arms it refuses."""
        place = choose_device(device)
        names = ModelNames(target, draft, str(place), dtype_name(choose_dtype(dtype, place)))
        self._models = models = load_models(names, backend, arms.values())
        refused = {}
        for name, options in arms.items():
            try:
                self._arms[name] = models.arm(name, options)
            except (SpecDecodeError, ValueError) as error:
                refused[name] = str(error)
        return {
            "protocol": PROTOCOL,
            "slices": True,
            "backend": models.chosen_backend,
            "versions": run_versions(target, models.backend_name),
            "refused": refused,
            "about": {
                name: {
                    "synthetic": arm.synthetic,
                    "against": arm.against,
                    "baseline": arm.baseline,
                    "lossy": arm.lossy or arm.unchecked,
                    "timed": arm.timed,
                    "peer": arm.peer,
                    "served": arm.server is not None,
                    "outside": "call" in arm.options and not below(arm.options["call"], Path.cwd()),
                }
                for name, arm in self._arms.items()
            },
            "pair": str(models),
            "device": names.device,
        }

    def unload(self) -> None:
        """Close the arms, and free the memory of the models."""
        for arm in self._arms.values():
            arm.close()
        self._models, self._arms = None, {}
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def prompts(self, spec: str) -> list[Any]:
        """Return token prompts by id, and their origins."""
        self._prompts, origins = token_prompts(spec, self._loaded.encoder)
        return [self._prompts, origins]

    def roofline(self) -> float:
        """Return the tokens per second that memory bandwidth allows, with a typical prompt in the cache."""
        return roofline_of(self._loaded.target, self._prompts)

    def rehearse(self, arm: str, prompt: list[int], length: int, expected: list[int]) -> dict[str, float]:
        return as_dict(counters_run(self._arms[arm], prompt, length, expected))

    def expected(self, arm: str, prompt: list[int], tokens: list[int]) -> list[int]:
        """Return the tokens that the arm must write, given its reference arm's tokens."""
        return list(self._arms[arm].expected(prompt, tokens, len(tokens)))

    def run(self, arm: str, prompt: list[int], length: int, expected: list[int]) -> dict[str, Any]:
        return timed(self._arms[arm], prompt, length, expected).as_json()

    def run_in_slices(
        self, arm: str, prompt: list[int], length: int, expected: list[int], steps: int
    ) -> dict[str, Any]:
        """Run an arm with a pause after each slice of some steps. Return the run, and the seconds of each slice."""
        with sliced(steps, self._pause) as slices:
            run = timed(self._arms[arm], prompt, length, expected)
        return {"run": run.as_json(), "slices": slices.seconds}

    def check(self, arm: str, prompt: list[int], expected: list[int], got: list[int], baseline: str = "") -> str:
        """Return the check of an output. Older versions do not send the name of the reference arm."""
        return check(self._arms[arm], prompt, expected, got, self._arms[baseline or arm])

    @property
    def _loaded(self) -> Models:
        assert self._models is not None
        return self._models


def serve(requests: Iterable[str], answer: Callable[[str], None]) -> None:
    """Answer each request, until there are no more. Within a run in slices, any line begins the next slice."""
    lines = iter(requests)

    def pause() -> None:
        answer(json.dumps({"slice": True}))
        if next(lines, None) is None:
            raise SystemExit  # the other side has died

    worker = Worker(pause)
    for line in lines:
        request = json.loads(line)
        do = request.pop("do")
        said: dict[str, Any]
        try:
            said = {"value": getattr(worker, do)(**request)}
        except torch.OutOfMemoryError:
            said = {"error": NO_MEMORY, "of_arm": True}
            if do == "load":
                worker.unload()
                said = {"error": NO_MEMORY, "memory": True}
        except ArmError as error:
            said = {"error": str(error), "of_arm": True}
        except (SpecDecodeError, ValueError) as error:
            said = {"error": str(error)}
        answer(json.dumps(said))


def main() -> None:
    """Answer requests on the standard output. Redirect other output of the process to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(line: str) -> None:
            answers.write(line + "\n")
            answers.flush()

        serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
