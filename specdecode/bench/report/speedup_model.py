"""Two models of the speedup by chain drafts, to compare with the measured speedup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

from specdecode.bench.report.palette import alike, method, shared_name
from specdecode.bench.runs.counts import ratio
from specdecode.bench.runs.names import BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile
from specdecode.bench.runs.statistics import Estimate

Real = TypeVar("Real", float, Fraction)


def acceptance(accepted: float, rejections: float) -> float:
    """Estimate the probability that a proposal is accepted if all earlier ones were; nan without any judged proposal.

    This is the maximum likelihood estimate of a geometric distribution that is cut off at the end of the draft. A step
    that accepts n proposals and rejects the next has probability alpha^n (1 - alpha). A step that accepts all its d
    proposals has probability alpha^d. As in both models below, alpha is the same for every proposal.

    Args:
        accepted: accepted proposals, summed over the steps.
        rejections: number of steps that rejected a proposal.
    """
    judged = accepted + rejections
    return accepted / judged if judged > 0 else math.nan


def expected_tokens(acceptance: Real, depth: int) -> Real:
    """Compute the mean number of tokens of a step: (1 - alpha^(K+1)) / (1 - alpha), or K + 1 if alpha is 1.

    Leviathan et al. 2023, equation 1, summed from the end: one token is certain. If the first proposal is accepted, the
    tokens of a draft that is one shorter follow.
    """
    tokens = 1 + 0 * acceptance
    for _ in range(depth):
        tokens = 1 + acceptance * tokens
    return tokens


def study_speedup(acceptance: Real, depth: int, draft: Real) -> Real:
    """Compute the approximation of the study that this package follows: (1 + K alpha) / (1 + K T_draft / T_target).

    It counts every proposal as accepted with probability alpha, even after a rejected one. So it is too large, and more
    so for longer drafts. It also assumes that a forward over K + 1 tokens costs no more than over one.

    Args:
        acceptance: alpha, the probability that one proposal is accepted.
        depth: K, proposals per step.
        draft: seconds to propose one token, divided by the seconds of plain decoding per token.
    """
    return (1 + depth * acceptance) / (1 + depth * draft)


def chain_speedup(acceptance: Real, depths: Sequence[int], draft: Real, verify: Real) -> Real:
    """Compute expected tokens over expected time, for the measured depths of drafts.

    If all drafts are K deep and `verify` is 1, this is Theorem 3.8 of Leviathan et al. 2023. Measured costs replace the
    theorem's assumption that a wide forward costs as much as a narrow one. Overhead is left out.

    Args:
        acceptance: alpha, the probability that one proposal is accepted.
        depths: entry d is the number of steps with a draft of depth d.
        draft: seconds to propose one token, divided by the seconds of plain decoding per token.
        verify: seconds of a step's target forward, in the same unit.
    """
    nothing = 0 * acceptance
    tokens = sum((count * expected_tokens(acceptance, depth) for depth, count in enumerate(depths)), start=nothing)
    return tokens / sum((count * (depth * draft + verify) for depth, count in enumerate(depths)), start=nothing)


@dataclass(frozen=True, slots=True)
class Modelled:
    """The speedup of an arm over its reference arm, modelled and measured.

    Attributes:
        arm: name of the arm.
        k: most proposals per step.
        acceptance: estimate of alpha, see `acceptance`.
        study, exact: speedups by the two models above, with this arm's acceptance and costs.
        steps: speedup from the measured steps and their tokens, without overhead: see `RunFile.predicted_speedup`.
        measured: measured speedup, overhead included.
    """

    arm: str
    k: int
    acceptance: float
    study: float
    exact: float
    steps: float
    measured: Estimate


def modelled(run: RunFile) -> dict[str, list[Modelled]]:
    """Return the chain arms of a run that differ only in K, by the name that they share, sorted by K.

    Arms without right outputs are left out. Files without settings or rejections have no such arms.
    """
    arms = [arm for arm, record in run.arms.items() if _is_chain(run, arm) and record.rows and not record.faulty]
    families = {}
    for family in alike(run, arms, "k"):
        family = sorted(family, key=lambda arm: run.arms[arm].options["k"])
        rows = [row for arm in family if (row := _modelled(run, arm)) is not None]
        if len(rows) > 1:
            families[shared_name(run, [row.arm for row in rows], "k")] = rows
    return families


def _is_chain(run: RunFile, arm: str) -> bool:
    record = run.arms[arm]
    options = record.options
    return (
        isinstance(options.get("k"), int)
        and not record.peer
        and method(run, arm) != BASELINE
        and options.get("shape", "chain") == "chain"
        and options.get("branches", 1) == 1
    )


def _modelled(run: RunFile, arm: str) -> Modelled | None:
    record, k = run.arms[arm], run.arms[arm].options["k"]
    depths, counts = record.histograms().depth, record.counts()
    proposed = sum(depth * steps for depth, steps in enumerate(depths))
    plain = _later_step_s(run.arms[run.baseline_of(arm)])
    step = _later_step_s(record)
    if not proposed or plain is None or step is None or counts.accepted is None or counts.rejections is None:
        return None
    alpha = acceptance(counts.accepted, counts.rejections)
    if math.isnan(alpha):
        return None
    draft, verify = step.draft * sum(depths) / proposed / plain.verify, step.verify / plain.verify
    return Modelled(
        arm,
        k,
        alpha,
        study_speedup(alpha, k, draft),
        chain_speedup(alpha, depths, draft, verify),
        run.predicted_speedup(arm),
        run.speedup(arm),
    )


def _later_step_s(record: ArmRecord) -> _StepSeconds | None:
    """Return the mean seconds of a step, except the first, which also reads the prompt; None if unknown."""
    counts, seconds = record.counts(), record.seconds()
    steps = counts.steps - counts.runs
    draft, verify = ratio(seconds.later_draft, steps), ratio(seconds.later_verify, steps)
    return None if draft is None or verify is None else _StepSeconds(draft, verify)


class _StepSeconds(NamedTuple):
    """The mean seconds of drafting and of verifying in a step."""

    draft: float
    verify: float
