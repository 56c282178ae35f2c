"""Time-boxed runs, for recommendations: they measure as many prompts as fit into some minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from specdecode.bench.arms.arm import Arm
from specdecode.bench.arms.callables import NO_MEMORY
from specdecode.bench.arms.entry import drafter_kinds
from specdecode.bench.arms.models import Models, load_models
from specdecode.bench.measure.bandwidth import roofline_of
from specdecode.bench.measure.block import Block, closing, measure_block, noted
from specdecode.bench.measure.counters import COUNTERS_RUN_TOKENS, counters_run
from specdecode.bench.measure.drift import Drift
from specdecode.bench.measure.experiment import Results
from specdecode.bench.measure.header import run_header, run_versions
from specdecode.bench.measure.steady import Steady
from specdecode.bench.plan import Plan
from specdecode.bench.report.recommend import is_hopeless
from specdecode.bench.runs.file import write_run
from specdecode.bench.runs.measures import CountersRun
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import RunFile
from specdecode.core.errors import SpecDecodeError, TokenizerMismatchError
from specdecode.evals.data import token_prompts
from specdecode.models.loading import check_vocabulary
from specdecode.support.environment import conditions
from specdecode.support.files import check_writable
from specdecode.support.progress import progress

_LEAST_BLOCKS = 2


def measure_within(plan: Plan, minutes: float, file: Path) -> tuple[RunFile, dict[str, str]]:
    """Measure the preset's arms prompt by prompt, the data sets in turn, until no further prompt fits into the time.

    At least two prompts are measured. An arm is dropped as soon as the run shows that it is hopeless. The run file is
    rewritten after each prompt, so an interruption loses only the current prompt.

    Args:
        plan: plan of the session. Its repeats and its baseline are ignored.
        minutes: time from now on, loading included.
        file: path of the run file.

    Returns:
        The run, and the reason for each arm of the preset that is not in it, by name.

    Raises:
        ValueError, SpecDecodeError: an option is wrong, a model cannot be loaded, or the file cannot be written.
    """
    started, limit_s = time.monotonic(), 60 * minutes
    if not minutes > 0:
        raise ValueError(f"the budget is {minutes} minutes: give more than 0")
    check_writable(file)
    models = load_models(plan.setup.names, plan.setup.backend, plan.preset.arms.values())
    target = models.target
    if target is None:
        raise ValueError(
            "all arms of the preset are from code or servers: there is no method of this package to recommend"
        )
    prompts, _ = token_prompts(plan.preset.prompts, target)
    order = _in_turn(list(prompts))
    about: dict[str, Any] = {"before": conditions(target.device), "roofline": roofline_of(target, prompts)}
    versions = run_versions(plan.identity.target, models.backend_name)
    blocks: list[Block] = []
    failures: dict[str, str] = {}
    steady, drift = Steady(device=target.device, bound=plan.again), Drift()

    def write() -> RunFile:
        results = Results(arms, blocks, counters_runs, failures)
        header = run_header(plan, results.outputs(), results.floor, prompts=prompts, versions=versions, **about)
        run = RunFile(file, header, results.records())
        write_run(run)
        return run

    with progress("seconds") as show:

        def tell(doing: str) -> None:
            # Two prompts may take longer than the budget, so a running session never shows as complete.
            whole = max(1, round(limit_s))
            show(min(round(time.monotonic() - started), whole - 1), whole, doing)

        arms, counters_runs, left_out = _usable_arms(plan, models, prompts[order[0]], tell)
        remaining_arms, last_block_s = list(arms), 0.0
        with closing(arms, failures):
            try:
                for prompt in order:
                    begun = time.monotonic()
                    if len(blocks) >= _LEAST_BLOCKS and begun - started + last_block_s > limit_s:
                        break
                    blocks.append(
                        measure_block(
                            remaining_arms,
                            prompt,
                            prompts[prompt],
                            plan.preset.max_new_tokens,
                            tell=tell,
                            failures=failures,
                            steady=steady,
                            parts=drift.parts,
                        )
                    )
                    drift.add(*blocks[-1].drift(BASELINE))
                    run = write()
                    hopeful = [arm for arm in remaining_arms if not is_hopeless(run, arm.name)]
                    needed = {BASELINE, *(arm.baseline for arm in hopeful)}
                    remaining_arms = [arm for arm in remaining_arms if arm in hopeful or arm.name in needed]
                    last_block_s = time.monotonic() - begun
            except KeyboardInterrupt:
                if not blocks:
                    raise
    return write(), left_out


def _in_turn(prompts: list[str]) -> list[str]:
    """Return the prompts with the data sets in turn, so that the first few prompts come from all data sets."""
    sets: dict[str, list[str]] = {}
    for prompt in prompts:
        sets.setdefault(prompt.rpartition("/")[0], []).append(prompt)
    return [prompt for turn in zip_longest(*sets.values()) for prompt in turn if prompt is not None]


def _usable_arms(
    plan: Plan, models: Models, prompt: Sequence[int], tell: Callable[[str], None]
) -> tuple[list[Arm], dict[str, CountersRun], dict[str, str]]:
    """Return the arms that run here, their counters runs, and the reasons for arms that are left out."""
    arms, counters_runs = [], {}
    left_out: dict[str, str] = {}
    length = min(plan.preset.max_new_tokens, COUNTERS_RUN_TOKENS)
    baseline_tokens: Sequence[int] = ()
    for name, entry in plan.preset.arms.items():
        tell(f"{name}, the counters run")
        arm = None
        try:
            if "universal" in (*drafter_kinds(entry), entry.get("peer")) and _same_vocabulary(models):
                raise ValueError("target and draft share a vocabulary, so drafting through text is not needed")
            arm = models.arm(name, entry, plan.preset.lengths)
            baseline_tokens = baseline_tokens or arm.run(prompt, length, ()).tokens
            counters_runs[name] = counters_run(arm, prompt, length, arm.expected(prompt, baseline_tokens, length))
        except (SpecDecodeError, ValueError, torch.OutOfMemoryError) as error:
            if name == BASELINE:
                raise
            if arm is not None:
                with noted(arm, left_out):  # another arm of the same server starts it again
                    arm.close()
            short = isinstance(error, torch.OutOfMemoryError)
            left_out[name] = NO_MEMORY if short else str(error)
        else:
            arms.append(arm)
    for arm in [arm for arm in arms if arm.baseline in left_out]:
        arms.remove(arm)
        arm.close()
        left_out[arm.name] = f"its reference arm {arm.baseline} is left out"
    return arms, counters_runs, left_out


def _same_vocabulary(models: Models) -> bool:
    """Return whether there is a draft model that shares the target's vocabulary."""
    if models.target is None or models.draft is None:
        return False
    try:
        check_vocabulary(models.target, models.draft)
    except TokenizerMismatchError:
        return False
    return True
