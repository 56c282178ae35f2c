"""Measuring for as long as one is willing to wait, to choose by it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any

from specdecode.bench.arms.arm import Arm, make
from specdecode.bench.measure.bandwidth import roofline
from specdecode.bench.measure.counters import rehearse
from specdecode.bench.measure.experiment import REHEARSED_TOKENS, Block, Results, measure_block
from specdecode.bench.options import Options
from specdecode.bench.report.recommend import is_hopeless
from specdecode.bench.runs.file import run_json
from specdecode.bench.runs.names import BASELINE, drafters
from specdecode.bench.runs.records import Header, RunFile
from specdecode.core.errors import SpecDecodeError, TokenizerMismatchError
from specdecode.evals.data import token_prompts
from specdecode.models.embedded import weights_of
from specdecode.models.lm import LM
from specdecode.models.loading import check_vocabulary
from specdecode.support.environment import conditions, environment
from specdecode.support.files import write_whole
from specdecode.support.progress import progress

_LEAST_BLOCKS = 2


def measure_within(options: Options, minutes: float, file: Path) -> tuple[RunFile, dict[str, str]]:
    """Measure the preset's arms prompt by prompt, the data sets in turn, until no further prompt fits into the time.

    At least two prompts are measured, and each with all arms but those that are hopeless by then. After each the run
    file is written anew; who interrupts loses the prompt that was being measured.

    Args:
        options: what to measure. Its repeats are not looked at.
        minutes: from now on, loading included.
        file: of the run.

    Returns:
        The run, and why arms of the preset are not in it, by their names.

    Raises:
        ValueError, SpecDecodeError: an option is wrong, a model cannot be had, or the file cannot be written.
    """
    started = time.monotonic()
    if not minutes > 0:
        raise ValueError(f"the budget is {minutes} minutes: give it some time")
    identity, chosen = options.identity, options.experiment
    target, draft = options.models()
    prompts, _ = token_prompts(chosen.prompts, target)
    turns = _in_turn(list(prompts))
    before, bandwidth = conditions(target.device), roofline(target)
    backend = target.with_backend(options.backend).backend
    versions = {**environment(), "weights": weights_of(identity.target), "backend": backend.name}
    blocks: list[Block] = []

    def kept() -> RunFile:
        results = Results(arms, blocks, rehearsals)
        around = {"before": before, "after": conditions(target.device)}
        header = Header(identity, chosen.max_new_tokens, results.outputs(), results.floor, bandwidth, versions, around)
        run = RunFile(file, header, results.records())
        content = {"datetime": datetime.now(timezone.utc).isoformat(), "specdecode": run_json(run), "benchmarks": []}
        try:
            write_whole(file, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"{file} cannot be written: {error.strerror}") from None
        return run

    with progress("seconds") as show:

        def tell(doing: str) -> None:
            # What is going on is never all of it: two prompts may take longer.
            whole = max(1, round(60 * minutes))
            show(min(round(time.monotonic() - started), whole - 1), whole, doing)

        arms, rehearsals, left_out = _made(options, target, draft, prompts[turns[0]], tell)
        still, took_s = list(arms), 0.0
        try:
            for prompt in turns:
                begun = time.monotonic()
                if len(blocks) >= _LEAST_BLOCKS and begun - started + took_s > 60 * minutes:
                    break
                blocks.append(measure_block(still, prompt, prompts[prompt], chosen.max_new_tokens, tell=tell))
                run = kept()
                still = [arm for arm in still if arm.name == BASELINE or not is_hopeless(run, arm.name)]
                took_s = time.monotonic() - begun
        except KeyboardInterrupt:
            if not blocks:
                raise
    return kept(), left_out


def _in_turn(prompts: list[str]) -> list[str]:
    """The prompts, one of each task after the other: the first of them are of all."""
    tasks: dict[str, list[str]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.rpartition("/")[0], []).append(prompt)
    return [prompt for turn in zip_longest(*tasks.values()) for prompt in turn if prompt is not None]


def _made(
    options: Options, target: LM, draft: LM | None, text: Sequence[int], tell: Callable[[str], None]
) -> tuple[list[Arm], dict[str, dict[str, float]], dict[str, str]]:
    """The arms that these models and packages allow, what was counted in their rehearsals, and why others are not."""
    arms, rehearsals, left_out = [], {}, {}
    chosen = options.experiment
    length = min(chosen.max_new_tokens, REHEARSED_TOKENS)
    written: Sequence[int] = ()
    entries: dict[str, dict[str, Any]] = {BASELINE: {}}
    for name, entry in (entries | chosen.arms).items():
        tell(f"{name}, a rehearsal")
        try:
            if "universal" in drafters(entry) and draft is not None and _same_vocabulary(target, draft):
                raise ValueError("target and draft share a vocabulary, so no draft need go by text")
            arm = make(name, entry, target, draft, options.backend, chosen.lengths)
            written = written or arm.run(text, length, ()).tokens
            rehearsals[name] = rehearse(arm, text, length, arm.expected(text, written, length))
        except (SpecDecodeError, ValueError) as error:
            if name == BASELINE:
                raise
            left_out[name] = str(error)
        else:
            arms.append(arm)
    return arms, rehearsals, left_out


def _same_vocabulary(target: LM, draft: LM) -> bool:
    try:
        check_vocabulary(target, draft)
    except TokenizerMismatchError:
        return False
    return True
