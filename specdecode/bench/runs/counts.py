"""What is counted and timed in runs: values by name, added up field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Values = TypeVar("Values", bound=DataclassInstance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counts of one run. A field is None where nobody counted: a peer has steps alone, older files lack some.

    Attributes:
        steps: target forwards that committed tokens.
        target_forwards: of the target, prefill included.
        draft_forwards: of the draft model.
        drafted: proposed tokens.
        accepted: proposals kept.
        rejections: steps that rejected a proposal.
        cache_bytes: of KV at the end.
        peak_cache_bytes: of KV at most.
        grown_bytes: by how much that is more than after the first step.
        attended_bytes: of KV that was read, over all steps.
        compressions: evictions carried out.
        later_tokens: those after the first step, which carries the prompt.
        ngrams: 4-grams of the output.
        repeated: 4-grams that stood in the output before.
        nll: negative log likelihood of the output, in nats.
    """

    steps: float
    target_forwards: float | None = None
    draft_forwards: float | None = None
    drafted: float | None = None
    accepted: float | None = None
    rejections: float | None = None
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
        runs: how many.
        tokens: that they wrote.
        agreed: tokens before an output leaves that of the arm's baseline.
    """

    runs: float
    tokens: float
    agreed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Seconds of the parts of one run; None for a peer, whose parts nobody times.

    Attributes:
        draft, verify, overhead: make up the whole run.
        later_draft, later_verify: after the first step, which carries the prompt.
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
        total: of the whole runs.
        ttft: to the first committed tokens.
        last: of an arm that others are compared with, the total of its second run in each block.
    """

    total: float
    ttft: float
    last: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Histograms:
    """Numbers of steps: entry n counts the steps with the value n. Empty for a peer.

    Attributes:
        accepted: by accepted length.
        depth: by depth of the tree.
    """

    accepted: list[int] = dataclasses.field(default_factory=list)
    depth: list[int] = dataclasses.field(default_factory=list)


def total(kind: type[Values], parts: Iterable[Values]) -> Values:
    """Sum counts or seconds, field by field, from nought. A field that one of the parts lacks is None."""
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


def as_dict(values: DataclassInstance) -> dict[str, Any]:
    """Return the known fields by name, those of nested values among them."""
    known: dict[str, Any] = {}
    for field in fields(values):
        value = getattr(values, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            known |= as_dict(value)
        elif value not in (None, []):
            known[field.name] = value
    return known


def from_dict(kind: type[Values], values: Mapping[str, Any]) -> Values:
    """Make what `as_dict` wrote; names of other versions are left out."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def ratio(part: float | None, whole: float | None) -> float | None:
    """Divide; None if either is not known, or the whole is nothing."""
    return part / whole if part is not None and whole is not None and whole > 0 else None
