"""What one timed call of an arm gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdecode.core.result import Generation
from specdecode.models.lm import LM, synchronise


@dataclass(frozen=True, slots=True)
class Run:
    """One output, its times and its counts: plain values, so that it travels as JSON.

    Attributes:
        tokens: the new tokens.
        total_s: seconds of the whole call, the device synchronised. Of a batch, here and below, a prompt's share.
        ttft_s: seconds to the first committed tokens.
        counts: of "steps" (target forwards that committed tokens); for our own arms also "target_forwards",
            "draft_forwards", "drafted" and "accepted" tokens, "rejections" (steps that rejected a proposal),
            "cache_bytes" at the end, "peak_cache_bytes", "grown_bytes" (by how much that is more than after the first
            step), "attended_bytes" of KV over all steps, "compressions", and "later_tokens": those after the first
            step, which carries the prompt.
        seconds: of our own arms: "draft", "verify" and "overhead", which make up the total; and "later_draft" and
            "later_verify", after the first step.
        histograms: of our own arms: steps by "accepted" length and by "depth" of the tree.
        cuts: what the run was when it had got to the shorter lengths that were asked for, one by one.
    """

    tokens: list[int]
    total_s: float
    ttft_s: float
    counts: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    cuts: list[Run] = field(default_factory=list)

    def at(self, length: int) -> Run | None:
        """What it was when it had got to a length; None where it was not cut there."""
        return next((run for run in (self, *self.cuts) if len(run.tokens) == length), None)


def run_of(results: Sequence[Generation], total_s: float, lengths: Sequence[int] = ()) -> Run:
    """Counts of the first prompt of a batch, and its share of the time: the same part for each prompt. A batch, whose
    prompts end at different times, is not cut."""
    result, share = results[0], 1 / len(results)

    def verify_s(start: int) -> float:
        # A forward is counted by each of its prompts; the one with the most steps was in all of them.
        return max(sum(step.verify_s for step in each.steps[start:]) for each in results)

    draft_s = share * sum(each.draft_s for each in results)
    verified_s = share * (verify_s(0) + sum(each.prefill_forwards_s for each in results))
    return Run(
        tokens=result.tokens,
        total_s=share * total_s,
        ttft_s=share * result.ttft_s,
        counts={
            "steps": len(result.steps),
            "target_forwards": result.target_forwards,
            "draft_forwards": result.draft_forwards,
            "drafted": result.drafted,
            "accepted": result.accepted,
            "rejections": result.rejections,
            "cache_bytes": result.cache_bytes,
            "peak_cache_bytes": result.peak_cache_bytes,
            "grown_bytes": max(0, result.peak_cache_bytes - result.steps[0].cache_bytes),
            "attended_bytes": result.attended_bytes,
            "compressions": result.compressions,
            "later_tokens": len(result.tokens) - result.steps[0].emitted,
        },
        seconds={
            "draft": draft_s,
            "verify": verified_s,
            "overhead": share * total_s - draft_s - verified_s,
            "later_draft": share * sum(step.draft_s for each in results for step in each.steps[1:]),
            "later_verify": share * verify_s(1),
        },
        histograms={"accepted": result.accepted_lengths, "depth": result.depths},
        cuts=[
            run_of([short], total_s - (result.total_s - short.total_s))
            for short in (result.until(length) for length in lengths if length < len(result.tokens))
            if len(results) == 1
        ],
    )


def timed_call(target: LM, call: Callable[[], Any]) -> tuple[Any, float]:
    synchronise(target.device)
    started = time.perf_counter()
    result = call()
    synchronise(target.device)
    return result, time.perf_counter() - started
