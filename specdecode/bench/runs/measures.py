"""The measures of an arm, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from specdecode.bench.runs.counts import RowCounts, ratio

_LESS_IS_BETTER, _MORE_IS_BETTER = {"sign": -1}, {"sign": +1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Measures that do not depend on the clock; None where they are not known.

    Attributes:
        target_forwards_per_token: forwards of the target per token of output.
        draft_forwards_per_token: forwards of the draft model per token of output.
        mean_acceptance_length: tokens of output per step (tau).
        acceptance_rate: share of the proposed tokens that were kept, from 0 to 1.
        cache_bytes: bytes of KV at the end of a run, the mean of the runs.
        peak_cache_bytes: bytes of KV at most, the mean of the runs.
        attended_bytes_per_step: bytes of KV that a step reads.
        compressions: evictions of a run, the mean of the runs.
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
    """What the untimed counters run counts. These depend on the kind of device; a peer has none.

    Attributes:
        host_syncs_per_step: times that Python waits for a tensor's content; None on the backend "compile".
        forwards_per_step: forwards of the target's modules, whoever calls them.
        weight_bytes: bytes of the target's weights.
        peak_bytes: bytes of memory held at most, above the loaded weights.
    """

    host_syncs_per_step: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    forwards_per_step: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    weight_bytes: float | None = field(default=None, metadata=_LESS_IS_BETTER)
    peak_bytes: float | None = field(default=None, metadata=_LESS_IS_BETTER)


SIGNS: dict[str, int] = {
    counter.name: counter.metadata["sign"] for kind in (Counters, CountersRun) for counter in fields(kind)
}
"""Of each counter: whether more of it is better (+1) or worse (-1)."""


def counters_of(counts: RowCounts) -> Counters:
    """Compute the counters that sums of counts give."""
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
    """What tables show of an arm, and pytest-benchmark keeps; None where it is not known.

    Attributes:
        throughput: tokens per second of all prompts.
        throughput_std: standard deviation of the tokens per second between prompts.
        speedup: ratio of speeds, over the arm's baseline.
        speedup_low, speedup_high: ends of the speedup's interval, which covers the true value with 95 %.
        ttft_s: seconds of a run to the first committed token, the median of the prompts.
        tpot_s: seconds per token after the first, the median of the prompts.
        counters, counters_run: what does not depend on the clock.
        predicted_speedup: ratio of speeds that acceptance and the costs of forwards promise, without overhead.
        roofline_share: share of the speed at which memory can stream the weights.
        ties: number of outputs that left the baseline's where the target is undecided within its rounding.
        bugs: number of wrong outputs.
        synthetic: 1 if weights or acceptance are not real, else 0.
        lossy: 1 if the arm may write other tokens than its baseline, else 0.
        agreement: share of tokens before an output leaves that of the baseline.
        self_ppl: perplexity of the output under the target itself.
        repetition: share of 4-grams that stood in the output before.
        grown_bytes: bytes of KV at most beyond those after the first step, the mean of the runs.
        draft_s_per_step: seconds of drafting a step.
        verify_s_per_step: seconds of verifying a step.
        overhead_s_per_step: seconds of the rest of a step.
        over_peer: ratio of speeds, over the peer's arm that does the same.
        over_peer_low, over_peer_high: ends of its interval, which covers the true value with 95 %.
        ttft_p95_s, tpot_p95_s: of a server's requests, the seconds to the first token and per token after it that 95 %
            of them do not exceed.
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
