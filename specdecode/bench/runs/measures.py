"""The measures of an arm, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from specdecode.bench.runs.counts import RowCounts, ratio

_LESS_IS_BETTER, _MORE_IS_BETTER = {"sign": -1}, {"sign": +1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Measures that do not depend on the clock; None where unknown.

    Attributes:
        target_forwards_per_token: forwards of the target per token of output.
        draft_forwards_per_token: forwards of the draft model per token of output.
        mean_acceptance_length: tokens of output per step (tau).
        acceptance_rate: share of the proposed tokens that were kept, from 0 to 1.
        cache_bytes: bytes of KV at the end of a run, mean of the runs.
        peak_cache_bytes: peak bytes of KV in a run, mean of the runs.
        attended_bytes_per_step: bytes of KV that a step reads.
        compressions: evictions in a run, mean of the runs.
    """

    target_forwards_per_token: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    draft_forwards_per_token: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    mean_acceptance_length: float | None = field(default=None, metadata=_MORE_IS_BETTER)
    acceptance_rate: float | None = field(default=None, metadata=_MORE_IS_BETTER)
    cache_bytes: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    peak_cache_bytes: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    attended_bytes_per_step: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    compressions: float | None = field(default=None, metadata=_LESS_IS_BETTER)


@dataclass(frozen=True, slots=True, kw_only=True)
class CountersRun:
    """Results of the untimed counters run. They depend on the kind of device; a peer has none.

    Attributes:
        host_syncs_per_step: waits of Python for a tensor's content per step; None on the backend "compile" without a
            GPU.
        forwards_per_step: forwards of the target's modules per step, by any caller.
        weight_bytes: bytes of the target's weights.
        peak_bytes: peak bytes of memory above the loaded weights.
    """

    host_syncs_per_step: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    forwards_per_step: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    weight_bytes: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    peak_bytes: float | None = field(default=None, metadata=_LESS_IS_BETTER)


SIGNS: dict[str, int] = {
    counter.name: counter.metadata["sign"] for kind in (Counters, CountersRun) for counter in fields(kind)
}
"""The direction of each counter: +1 if more is better, -1 if less is better."""


def counters_of(counts: RowCounts) -> Counters:
    """Compute the counters from sums of counts."""
    return Counters(
        target_forwards_per_token=ratio(counts.target_forwards, counts.tokens),
        draft_forwards_per_token=ratio(counts.draft_forwards, counts.tokens),
        mean_acceptance_length=ratio(counts.tokens, counts.steps),
        acceptance_rate=ratio(counts.accepted, counts.drafted),
        cache_bytes=ratio(counts.cache_bytes, counts.runs),
        peak_cache_bytes=ratio(counts.peak_cache_bytes, counts.runs),
        attended_bytes_per_step=ratio(counts.attended_bytes, counts.steps),
        compressions=ratio(counts.compressions, counts.runs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Measures of an arm, shown in tables and stored by pytest-benchmark; None where unknown.

    Attributes:
        throughput: tokens per second over all prompts.
        throughput_std: standard deviation of the tokens per second between prompts.
        speedup: speed of the arm over the speed of its reference arm.
        speedup_low, speedup_high: ends of the speedup's 95 % confidence interval.
        ttft_s: seconds to the first committed token, median of the prompts.
        tpot_s: seconds per token after the first, median of the prompts.
        counters, counters_run: measures that do not depend on the clock.
        predicted_speedup: speedup computed from the acceptance and the costs of forwards, without overhead.
        roofline_share: share of the speed at which memory can stream the weights once per token.
        ties: number of outputs whose first difference from the reference arm's output is within the target's rounding.
        bugs: number of wrong outputs.
        synthetic: 1 if weights or acceptance are artificial, else 0.
        lossy: 1 if the arm may write other tokens than its reference arm, else 0.
        agreement: share of tokens before an output first differs from the reference arm's.
        self_ppl: perplexity of the output under the target itself.
        repetition: share of 4-grams that occurred earlier in the output.
        grown_bytes: peak bytes of KV minus the bytes after the first step, mean of the runs.
        draft_s_per_step: seconds of drafting per step.
        verify_s_per_step: seconds of verifying per step.
        overhead_s_per_step: other seconds per step.
        over_peer: speed of the arm over the speed of the peer's arm with the same method and settings.
        over_peer_low, over_peer_high: ends of the 95 % confidence interval of `over_peer`.
        ttft_p95_s, tpot_p95_s: 95th percentiles over a server's requests, of the seconds to the first token and of the
            seconds per token after it.
    """

    throughput: float | None
    throughput_std: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    ttft_s: float | None
    tpot_s: float | None
    counters: Counters
    counters_run: CountersRun
    predicted_speedup: float | None
    roofline_share: float | None
    ties: float
    bugs: float
    synthetic: float
    lossy: float
    agreement: float | None
    self_ppl: float | None
    repetition: float | None
    grown_bytes: float | None
    draft_s_per_step: float | None
    verify_s_per_step: float | None
    overhead_s_per_step: float | None
    over_peer: float | None = None
    over_peer_low: float | None = None
    over_peer_high: float | None = None
    ttft_p95_s: float | None = None
    tpot_p95_s: float | None = None
