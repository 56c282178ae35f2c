"""Measure how near the forwards of each backend come to the roofline, which is what the memory allows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from specdecode.backends import BACKENDS
from specdecode.bench.measure.bandwidth import copy_bandwidth, token_bytes
from specdecode.core.errors import UnsupportedModelError
from specdecode.decoding.measure_costs import cached_tokens, forward_seconds
from specdecode.models.lm import LM

WIDER = (8, 16, 32)
"""Rows of the forwards that speculation needs to cost little more than one of one row."""

# Far more rounds than `measure_costs` takes: nobody is waiting for the first token.
_ROUNDS, _LIMIT_S = 25, 20.0


@dataclass(frozen=True, slots=True)
class BackendForwards:
    """The forwards of one backend.

    Attributes:
        weight_bytes: of the weights as they are stored.
        seconds: of a forward by its rows: 1, and those of `WIDER` that fit the context.
    """

    weight_bytes: int
    seconds: dict[int, float]

    @property
    def throughput(self) -> float:
        """Tokens per second of autoregressive decoding if nothing but its forwards took time."""
        return 1 / self.seconds[1]

    @property
    def multiples(self) -> dict[int, float]:
        """Seconds of the wider forwards, in forwards of one row."""
        return {rows: self.seconds[rows] / self.seconds[1] for rows in WIDER if rows in self.seconds}


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a device allows a model, and how near its backends come to that.

    Attributes:
        bandwidth: bytes per second that a large copy reads and writes on the device.
        token_bytes: that a forward reads: weights, and the keys and values that are cached.
        backends: by name, those that work here.
        missing: by name, why the others do not.
    """

    bandwidth: float
    token_bytes: int
    backends: dict[str, BackendForwards]
    missing: dict[str, str]

    @property
    def throughput(self) -> float:
        """Tokens per second if nothing but streaming the weights took time."""
        return self.bandwidth / self.token_bytes

    def share(self, backend: str) -> float:
        """Return the throughput of a backend as a share of the roofline."""
        return self.backends[backend].throughput / self.throughput


def measure_roofline(target: LM, tell: Callable[[int, int, str], None]) -> Roofline:
    """Time the target's forwards on all backends, which take turns.

    Args:
        target: on the backend "eager".
        tell: called with the rounds done, their number, and what is being measured.
    """
    variants: dict[str, LM] = {}
    missing: dict[str, str] = {}
    for kind in BACKENDS:
        if kind == "auto":
            continue
        tell(0, _ROUNDS, f"preparing {kind}")
        try:
            variant = target.with_backend(kind)
        except (UnsupportedModelError, ValueError) as error:
            missing[kind] = str(error)
            continue
        if variant.backend.name == kind:
            variants[kind] = variant
        else:
            missing[kind] = re.sub(r"^not \w+: ", "", variant.backend.note)
    bandwidth = copy_bandwidth(target.device)
    seconds = forward_seconds(list(variants.values()), (1, *WIDER), repeats=_ROUNDS, seconds=_LIMIT_S, tell=tell)
    backends = {
        kind: BackendForwards(variant.weight_bytes, by_rows)
        for (kind, variant), by_rows in zip(variants.items(), seconds, strict=True)
    }
    return Roofline(bandwidth, token_bytes(target, cached_tokens(target, WIDER[-1])), backends, missing)
