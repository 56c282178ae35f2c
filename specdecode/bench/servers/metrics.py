"""An engine's counters since its start: Prometheus' counters at "/metrics"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from specdecode.bench.servers.engines import Speculation


@dataclass(frozen=True, slots=True)
class Counted:
    """Counters of an engine, or the differences between two readings of them.

    Attributes:
        drafts: number of verified drafts.
        drafted: number of proposed tokens.
        accepted: number of proposals kept.
        by_position: number of proposals kept, by position from 0.
        generated: number of tokens of all outputs.
        cached: number of tokens of prompts from the prefix cache; None if the engine does not count them.
    """

    drafts: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    by_position: Mapping[int, float] = field(default_factory=dict, hash=False)
    generated: float = 0.0
    cached: float | None = None

    def since(self, before: Counted) -> Counted:
        """Return the growth of each counter."""
        return Counted(
            drafts=self.drafts - before.drafts,
            drafted=self.drafted - before.drafted,
            accepted=self.accepted - before.accepted,
            by_position={at: count - before.by_position.get(at, 0.0) for at, count in self.by_position.items()},
            generated=self.generated - before.generated,
            cached=None if self.cached is None else self.cached - (before.cached or 0.0),
        )

    def speculation(self) -> Speculation:
        """Return the report on speculation."""
        kept = [self.by_position[at] for at in sorted(self.by_position)]
        return Speculation(drafts=self.drafts, drafted=self.drafted, accepted=self.accepted, by_position=kept)


def counted(text: str, names: Mapping[str, str]) -> Counted | None:
    """Read counters. Return None if the engine counts nothing, as vLLM with --disable-log-stats.

    Args:
        text: answer of "/metrics".
        names: names of the counters without "_total", by field of `Counted`. Counters of several models, or of several
            processes of an engine, are added up.

    Raises:
        ValueError: the text is not in Prometheus' format.
    """
    values: dict[str, float] = {}
    by_position: dict[int, float] = {}
    fields = {f"{name}_total": key for key, name in names.items()}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        key = fields.get(sample.name)
        if key == "by_position":
            place = int(sample.labels["position"])
            by_position[place] = by_position.get(place, 0.0) + sample.value
        elif key is not None:
            values[key] = values.get(key, 0.0) + sample.value
    return Counted(**values, by_position=by_position) if "generated" in values else None
