"""The measures of an arm, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from specdecode.bench.runs.counts import RowCounts, ratio

_LESS_IS_BETTER, _MORE_IS_BETTER = {"sign": -1}, {"sign": +1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Measures that do not depend on the clock; None where they are not known."""

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
        weight_bytes: of the target.
        peak_bytes: the most memory held, above the loaded weights.
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
        throughput, throughput_std: tokens per second of all prompts; the standard deviation between them.
        speedup, speedup_low, speedup_high: over `ar`, with the interval.
        ttft_s, tpot_s: of a run, the median of the prompts.
        counters, counters_run: what does not depend on the clock.
        predicted_speedup: see `RunFile.predicted_speedup`.
        roofline_share: of the speed at which memory can stream the weights.
        ties, bugs: outputs.
        synthetic, lossy: 1 if the arm is, else 0.
        agreement: the share of tokens before an output leaves that of `ar`.
        self_ppl: perplexity of the output under the target itself.
        repetition: the share of 4-grams that stood in the output before.
        grown_bytes: of KV, since the first step.
        draft_s_per_step, verify_s_per_step, overhead_s_per_step: seconds.
        over_peer, over_peer_low, over_peer_high: speedup over the peer's arm that does the same, with the interval.
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
