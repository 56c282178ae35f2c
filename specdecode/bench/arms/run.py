"""The result of one timed call of an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdecode.bench.runs.counts import (
    Counts,
    Histograms,
    Latencies,
    Seconds,
    as_dict,
    from_dict,
    histograms_in,
    latencies_in,
)
from specdecode.core.result import Generation
from specdecode.support.checked import LEAST_SECONDS, count, counts, flag, items, mapping, number


@dataclass(frozen=True, slots=True)
class Run:
    """One output with its times and counts, as plain values that can be sent as JSON.

    Attributes:
        tokens: the new tokens; several outputs are concatenated.
        total_s: seconds of the whole call, with the device synchronised. In a batch, here and below, a prompt's share.
        ttft_s: seconds to the first committed tokens.
        counts, seconds, histograms: complete for this package's arms; a peer has only steps.
        latencies: latencies of a server's requests.
        cuts: the run as it was at each of the requested shorter lengths.
        tries: number of measurements, repeated because other work disturbed them. This is the least disturbed one.
        disturbed: whether other work disturbed this measurement too.
        captured: whether it captured CUDA graphs or compiled, like the tries before it.
        slices: number of slices of a run that took turns; 0 for one that is compared as a whole.
        left_out: number of slices that are not compared, because other work disturbed them.
        beside_s: seconds per token of the reference arm right before and after this run, their geometric mean; None if
            unknown.
    """

    tokens: list[int]
    total_s: float
    ttft_s: float
    counts: Counts
    seconds: Seconds = field(default_factory=Seconds)
    histograms: Histograms = field(default_factory=Histograms)
    latencies: Latencies = field(default_factory=Latencies)
    cuts: list[Run] = field(default_factory=list)
    tries: int = 1
    disturbed: bool = False
    captured: bool = False
    slices: int = 0
    left_out: int = 0
    beside_s: float | None = None

    @property
    def outputs(self) -> list[list[int]]:
        """Return the outputs. A server may decode several prompts; their outputs are taken to be of equal length."""
        length = len(self.tokens) // max(1, len(self.latencies.ttft))
        return [self.tokens[start : start + length] for start in range(0, len(self.tokens), length)]

    @property
    def s_per_token(self) -> float:
        """Return the seconds per token."""
        return self.total_s / len(self.tokens)

    def at(self, length: int) -> Run | None:
        """Return the run as it was at a length; None if it was not cut there."""
        return next((run for run in (self, *self.cuts) if len(run.tokens) == length), None)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, in the format of journals and workers of all versions."""
        return {
            "tokens": self.tokens,
            "total_s": self.total_s,
            "ttft_s": self.ttft_s,
            "counts": as_dict(self.counts),
            "seconds": as_dict(self.seconds),
            "histograms": as_dict(self.histograms),
            "cuts": [cut.as_json() for cut in self.cuts],
            **({"latencies": as_dict(self.latencies)} if self.latencies.ttft else {}),
            **({"tries": self.tries} if self.tries > 1 else {}),
            **({"disturbed": True} if self.disturbed else {}),
            **({"captured": True} if self.captured else {}),
            **({"slices": self.slices, "left_out": self.left_out} if self.slices else {}),
            **({"beside_s": self.beside_s} if self.beside_s is not None else {}),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Run:
        """Build a run from the result of `as_json`. Each value is checked, because a journal may be damaged.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or invalid.
        """
        tokens = counts(entry["tokens"], "tokens")
        if not tokens:
            raise ValueError("tokens is [], and a run has at least one")
        return cls(
            tokens=tokens,
            total_s=number(entry, "total_s", LEAST_SECONDS),
            ttft_s=number(entry, "ttft_s", 0.0),
            counts=from_dict(Counts, _positive(entry, "counts")),
            seconds=from_dict(Seconds, _positive(entry, "seconds")),
            histograms=histograms_in(entry),
            latencies=latencies_in(entry),
            cuts=[cls.from_json(mapping(cut, "a cut")) for cut in items(entry["cuts"], "cuts")],
            tries=count(entry, "tries", least=1) if "tries" in entry else 1,
            disturbed=flag(entry, "disturbed", default=False),
            captured=flag(entry, "captured", default=False),
            slices=count(entry, "slices") if "slices" in entry else 0,
            left_out=count(entry, "left_out") if "left_out" in entry else 0,
            beside_s=number(entry, "beside_s", LEAST_SECONDS) if "beside_s" in entry else None,
        )


def disturbances(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the numbers of an arm's runs and slices that other work or captures disturbed, by the names of
    `ArmRecord`."""
    return {
        "repeated": sum(run.tries > 1 for run in runs),
        "disturbed": sum(run.disturbed for run in runs),
        "captured": sum(run.captured for run in runs),
        "slices": sum(run.slices for run in runs),
        "left_out": sum(run.left_out for run in runs),
    }


def _positive(entry: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Return counts or seconds, none of them negative."""
    values = mapping(entry[kind], kind)
    return {name: number(values, name, 0.0) for name in values}


def run_of(results: Sequence[Generation], total_s: float, lengths: Sequence[int] = (), lost: int | None = None) -> Run:
    """Return the run of a batch's first prompt: its counts, and its share of the time, which is equal for each prompt.

    A batch is not cut, because its prompts end at different times.

    Args:
        results: the results of the batch.
        total_s: seconds of the whole call.
        lengths: lengths at which to cut the run.
        lost: see `Counts`. It is unknown for a cut.
    """
    result, share = results[0], 1 / len(results)

    def verify_s(start: int) -> float:
        # Each prompt of a forward counts its seconds. The prompt with the most steps was in all forwards.
        return max(sum(step.verify_s for step in prompt.steps[start:]) for prompt in results)

    draft_s = share * sum(prompt.draft_s for prompt in results)
    verified_s = share * (verify_s(0) + sum(prompt.prefill_forwards_s for prompt in results))
    return Run(
        tokens=result.tokens,
        total_s=share * total_s,
        ttft_s=share * result.ttft_s,
        counts=Counts(
            steps=len(result.steps),
            target_forwards=result.target_forwards,
            draft_forwards=result.draft_forwards,
            drafted=result.drafted,
            accepted=result.accepted,
            rejections=result.rejections,
            lost=lost,
            cache_bytes=result.cache_bytes,
            peak_cache_bytes=result.peak_cache_bytes,
            grown_bytes=max(0, result.peak_cache_bytes - result.steps[0].cache_bytes),
            attended_bytes=result.attended_bytes,
            compressions=result.compressions,
            later_tokens=len(result.tokens) - result.steps[0].emitted,
        ),
        seconds=Seconds(
            draft=draft_s,
            verify=verified_s,
            overhead=max(0.0, share * total_s - draft_s - verified_s),  # rounding must not make it negative
            later_draft=share * sum(step.draft_s for prompt in results for step in prompt.steps[1:]),
            later_verify=share * verify_s(1),
        ),
        histograms=Histograms(accepted=result.accepted_lengths, depth=result.depths),
        cuts=[
            run_of([short], total_s - (result.total_s - short.total_s))
            for short in (result.until(length) for length in lengths if length < len(result.tokens))
            if len(results) == 1
        ],
    )
