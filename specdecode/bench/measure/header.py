"""The header of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specdecode.bench.plan import Plan
from specdecode.bench.runs.names import digest
from specdecode.bench.runs.records import Header
from specdecode.models.embedded import weights_of
from specdecode.support.environment import conditions, environment


def run_versions(target: str, backend: str) -> dict[str, str | int]:
    """Return the versions that a run depends on, the source of the target's weights, and the backend's name."""
    return {**environment(), "weights": weights_of(target), "backend": backend}


def run_header(
    plan: Plan,
    outputs: dict[str, str],
    floor: float,
    *,
    prompts: Mapping[str, Sequence[int]],
    roofline: float,
    versions: Mapping[str, str | int],
    before: dict[str, str],
    budget_spent: bool = False,
    left: int = 0,
    unselected: Sequence[str] = (),
) -> Header:
    """Return the header of a run that has just ended. Read the conditions after the run.

    Args:
        plan: plan of the session.
        outputs: digests of the reference arm's outputs, by prompt.
        floor: the A/A floor, in logarithms.
        prompts: tokens of the prompts, by id.
        roofline: tokens per second that the memory bandwidth allows.
        versions: see `run_versions`.
        before: the conditions before the run.
        budget_spent: whether the time budget ended the repeats.
        left: number of blocks that were not measured.
        unselected: arms of the preset, or of the compared run or commit, that were not selected.
    """
    return Header(
        identity=plan.identity,
        max_new_tokens=plan.preset.max_new_tokens,
        outputs=outputs,
        floor=floor,
        roofline=roofline,
        versions=dict(versions),
        conditions={"before": before, "after": conditions(plan.setup.device)},
        baseline=plan.preset.baseline,
        until=plan.until,
        budget_spent=budget_spent,
        left=left,
        unselected=list(unselected),
        tolerance=plan.tolerance,
        prompts={prompt: digest(prompts[prompt]) for prompt in outputs},
    )
