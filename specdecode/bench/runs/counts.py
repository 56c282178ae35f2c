"""Counts and seconds of runs: values by name, summed field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from specdecode.support.checked import LEAST_SECONDS, counts, mapping, numbers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Values = TypeVar("Values", bound=DataclassInstance)


# Bounds of divisors: the least value of a field in files.
_AT_LEAST_ONE = {"least": 1}
_AT_LEAST_A_TICK = {"least": LEAST_SECONDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counts of one run. A field that was not counted is None: a peer has only steps, and older files lack some.

    Attributes:
        steps: number of steps, target forwards that committed tokens.
        target_forwards: number of forwards of the target, prefill included.
        draft_forwards: number of forwards of the draft model.
        drafted: number of proposed tokens.
        accepted: number of proposals kept.
        rejections: number of steps that rejected a proposal.
        lost: number of proposals that found no place in the replayed text, so that they were right by chance only; None
            for an arm without `replay`.
        cache_bytes: bytes of KV at the end.
        peak_cache_bytes: peak bytes of KV.
        grown_bytes: peak bytes of KV minus the bytes after the first step.
        attended_bytes: bytes of KV that were read, over all steps.
        compressions: number of evictions carried out.
        later_tokens: number of tokens after the first step, which processes the prompt.
        ngrams: number of 4-grams of the output.
        repeated: number of 4-grams that occurred earlier in the output.
        nll: negative log likelihood of the output under the target, in nats.
    """

    steps: float = field(metadata=_AT_LEAST_ONE)
    target_forwards: float | None = None
    draft_forwards: float | None = None
    drafted: float | None = None
    accepted: float | None = None
    rejections: float | None = None
    lost: float | None = None
    cache_bytes: float | None = None
    peak_cache_bytes: float | None = None
    grown_bytes: float | None = None
    attended_bytes: float | None = None
    compressions: float | None = None
    later_tokens: float | None = None
    ngrams: float | None = None
    repeated: float | None = None
    nll: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts(Counts):
    """Counts summed over runs.

    Attributes:
        runs: number of runs.
        tokens: number of tokens of their outputs.
        agreed: number of tokens before an output first differs from the reference arm's.
    """

    runs: float = field(metadata=_AT_LEAST_ONE)
    tokens: float = field(metadata=_AT_LEAST_ONE)
    agreed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Seconds of the parts of one run; None for a peer, whose parts are not timed.

    Attributes:
        draft: seconds of drafting. The seconds of drafting, verifying and overhead add up to the whole run.
        verify: seconds of the target's forwards and of accepting proposals.
        overhead: other seconds.
        later_draft: seconds of drafting after the first step, which processes the prompt.
        later_verify: seconds of verifying after the first step.
    """

    draft: float | None = None
    verify: float | None = None
    overhead: float | None = None
    later_draft: float | None = None
    later_verify: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSeconds(Seconds):
    """Seconds summed over runs.

    Attributes:
        total: seconds of the whole runs.
        ttft: seconds to the first committed tokens.
        last: seconds of the second run in each block, if other arms are compared with it.
    """

    total: float = field(metadata=_AT_LEAST_A_TICK)
    ttft: float = field(metadata=_AT_LEAST_A_TICK)
    last: float | None = field(default=None, metadata=_AT_LEAST_A_TICK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histograms:
    """Histograms of steps: entry n is the number of steps with the value n. Empty for a peer.

    Attributes:
        accepted: number of steps by accepted length.
        depth: number of steps by depth of the tree.
    """

    accepted: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Seconds of each request to a server. Empty for arms without a server.

    Attributes:
        ttft: seconds from the request to the first tokens.
        tpot: seconds per token after the first.
    """

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)


def all_latencies(parts: Iterable[Latencies]) -> Latencies:
    """Concatenate latencies."""
    parts = list(parts)
    return Latencies(
        **{entry.name: [value for part in parts for value in getattr(part, entry.name)] for entry in fields(Latencies)}
    )


def latencies_in(entry: Mapping[str, Any]) -> Latencies:
    """Return an entry's latencies, none of them negative; they are empty for older entries.

    Raises:
        ValueError: a value is invalid.
    """
    values = mapping(entry.get("latencies", {}), "latencies")
    return from_dict(Latencies, {name: numbers(value, name, 0.0) for name, value in values.items()})


def histograms_in(entry: Mapping[str, Any]) -> Histograms:
    """Return an entry's histograms.

    Raises:
        KeyError, ValueError: they are missing, or a value is invalid.
    """
    values = mapping(entry["histograms"], "histograms")
    return from_dict(Histograms, {name: counts(value, name) for name, value in values.items()})


def total(kind: type[Values], parts: Iterable[Values]) -> Values:
    """Sum counts or seconds, field by field, from 0. A field is None in the sum if it is None in any part."""
    parts = list(parts)
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(kind)}
    return kind(**{name: None if None in column else sum(column) for name, column in columns.items()})


def total_histograms(parts: Iterable[Histograms]) -> Histograms:
    """Sum histograms entry by entry."""
    parts = list(parts)
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Histograms)}
    return Histograms(
        **{name: [sum(entries) for entries in zip_longest(*column, fillvalue=0)] for name, column in columns.items()}
    )


def lacks_our_counts(rows: Iterable[RowCounts]) -> bool:
    """Return whether the counts are a peer's. Older versions do not store the kind of an arm."""
    return any(row.target_forwards is None for row in rows)


def as_dict(values: DataclassInstance) -> dict[str, Any]:
    """Return the known fields by name, including the fields of nested dataclasses."""
    known: dict[str, Any] = {}
    for entry in fields(values):
        value = getattr(values, entry.name)
        if is_dataclass(value) and not isinstance(value, type):
            known |= as_dict(value)
        elif value not in (None, []):
            known[entry.name] = value
    return known


def from_dict(kind: type[Values], values: Mapping[str, Any]) -> Values:
    """Build an instance from the result of `as_dict`. Names of other versions are left out."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return the part over the whole; None if either is unknown, or the whole is not positive."""
    return part / whole if part is not None and whole is not None and whole > 0 else None
