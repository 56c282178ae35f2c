"""Two models of the speedup that a chain of drafts should give, to be compared with the measured one."""

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
    """Estimate the probability that a proposal is accepted once those before it were; nan if none was ever judged.

    This is the maximum of the likelihood of a geometric distribution that is cut off at the end of the draft. A step
    that accepts n proposals and rejects the next has probability alpha^n (1 - alpha), one that accepts all of its d has
    alpha^d. Every proposal is taken for as likely as any other, as by both models below.

    Args:
        accepted: proposals, summed over the steps.
        rejections: steps that rejected one.
    """
    judged = accepted + rejections
    return accepted / judged if judged > 0 else math.nan


def expected_tokens(acceptance: Real, depth: int) -> Real:
    """Compute the tokens that a step commits on average: (1 - alpha^(K+1)) / (1 - alpha), or K + 1 where alpha is 1.

    Leviathan et al. 2023, equation 1, summed up from the end: one token is certain, and if the first proposal is
    accepted there come those of a draft that is one shorter.
    """
    tokens = 1 + 0 * acceptance
    for _ in range(depth):
        tokens = 1 + acceptance * tokens
    return tokens


def study_speedup(acceptance: Real, depth: int, draft: Real) -> Real:
    """Compute the approximation of the study that this package follows: (1 + K alpha) / (1 + K T_draft / T_target).

    It counts every proposal as accepted with probability alpha, also behind one that was rejected: it promises too
    much, and the more the longer the draft is. And it takes a forward over K + 1 tokens to cost no more than over one.

    Args:
        acceptance: alpha, of one proposal.
        depth: K, proposals a step.
        draft: seconds to propose one token, in units of a plain token's.
    """
    return (1 + depth * acceptance) / (1 + depth * draft)


def chain_speedup(acceptance: Real, depths: Sequence[int], draft: Real, verify: Real) -> Real:
    """Compute expected tokens over expected time, for drafts of the depths that really occurred.

    With all drafts K deep and `verify` 1 it is Theorem 3.8 of Leviathan et al. 2023; measured costs take the place of
    its assumption that a wide forward costs as much as a narrow one. Overhead is left out.

    Args:
        acceptance: alpha, of one proposal.
        depths: entry d counts the steps whose draft was d tokens deep.
        draft: seconds to propose one token, in units of a plain token's.
        verify: seconds of a step's target forward, in the same units.
    """
    nothing = 0 * acceptance
    tokens = sum((count * expected_tokens(acceptance, depth) for depth, count in enumerate(depths)), start=nothing)
    return tokens / sum((count * (depth * draft + verify) for depth, count in enumerate(depths)), start=nothing)


@dataclass(frozen=True, slots=True)
class Modelled:
    """An arm's speedup over its baseline, by the models and as it is.

    Attributes:
        arm: its name.
        k: proposals a step, at most.
        acceptance: see `acceptance`.
        study, exact: by the two models above, with what this arm accepted and with its own costs.
        steps: from the measured steps, see `RunFile.predicted_speedup`: with the tokens that they really gave.
        measured: with everything.
    """

    arm: str
    k: int
    acceptance: float
    study: float
    exact: float
    steps: float
    measured: Estimate


def modelled(run: RunFile) -> dict[str, list[Modelled]]:
    """Return the chains of a run that differ in nothing but K, by the name that they share, in the order of K.

    Left out are arms without a right output, and files that tell neither settings nor rejections.
    """
    arms = [arm for arm, record in run.arms.items() if _is_chain(run, arm) and record.rows and not record.bugs]
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
    """Return the seconds of a step, of those after the first, which carries the prompt; None if they are not known."""
    counts, seconds = record.counts(), record.seconds()
    steps = counts.steps - counts.runs
    draft, verify = ratio(seconds.later_draft, steps), ratio(seconds.later_verify, steps)
    return None if draft is None or verify is None else _StepSeconds(draft, verify)


class _StepSeconds(NamedTuple):
    """The mean seconds that a step drafts and verifies."""

    draft: float
    verify: float
