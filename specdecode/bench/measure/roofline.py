"""The throughput of forwards, by backend and weights, as a share of the roofline, the limit set by memory bandwidth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdecode.backends import BACKENDS
from specdecode.bench.measure.bandwidth import read_bandwidth, token_bytes
from specdecode.core.errors import UnsupportedModelError
from specdecode.decoding.measure_costs import LayerSeconds, cached_tokens, forward_seconds, layer_seconds
from specdecode.models.lm import LM
from specdecode.models.quantize import KINDS

WIDER = (8, 16, 32)
"""Rows of the wider forwards. Speculation pays only if they cost little more than a forward of one row."""

# Far more rounds than in `measure_costs`: here no user waits for the first token.
_ROUNDS, _LIMIT_S, _LAYERS_LIMIT_S = 25, 20.0, 4.0


@dataclass(frozen=True, slots=True)
class BackendForwards:
    """The measured forwards of one backend, or of one kind of quantised weights.

    Attributes:
        weight_bytes: bytes of the stored weights.
        seconds: seconds of a forward, by its rows: 1, and those of `WIDER` that fit the context.
        row: seconds of a forward of one row and of its layers; None if forwards are compiled or captured as a whole.
    """

    weight_bytes: int
    seconds: dict[int, float]
    row: LayerSeconds | None

    @property
    def throughput(self) -> float:
        """Tokens per second of autoregressive decoding if only forwards took time."""
        return 1 / self.seconds[1]

    @property
    def multiples(self) -> dict[int, float]:
        """Seconds of each wider forward over those of a forward of one row, by rows."""
        return {rows: self.seconds[rows] / self.seconds[1] for rows in WIDER if rows in self.seconds}


@dataclass(frozen=True, slots=True)
class Roofline:
    """The roofline of an unquantised model on a device, and the forwards of the backends.

    Attributes:
        bandwidth: bytes per second that the device reads from its memory.
        token_bytes: bytes that a forward reads: weights, and cached keys and values.
        backends: forwards of the backends and the kinds of quantised weights that work here, by name.
        missing: reasons why the others do not work here, by name.
    """

    bandwidth: float
    token_bytes: int
    backends: dict[str, BackendForwards]
    missing: dict[str, str]

    @property
    def throughput(self) -> float:
        """Tokens per second of autoregressive decoding if only memory reads took time."""
        return self.bandwidth / self.token_bytes

    def share(self, backend: str) -> float:
        """Return the throughput of a backend as a share of the roofline."""
        return self.backends[backend].throughput / self.throughput


def prepare_variants(
    target: LM, kinds: Sequence[str] | None = None, tell: Callable[[str], None] = lambda kind: None
) -> tuple[dict[str, LM], dict[str, str]]:
    """Return the target on each backend and with each kind of quantised weights, and why some do not work here.

    A variant that works is built once.

    Args:
        target: a model on the backend "eager".
        kinds: the backends and the kinds of quantised weights; all if None.
        tell: called with the kind that is prepared next.

    Raises:
        ValueError: there is no such kind.
    """
    known = [kind for kind in (*BACKENDS, *KINDS) if kind != "auto"]
    if unknown := [kind for kind in kinds or () if kind not in known]:
        raise ValueError(f"no backend is named {unknown[0]!r}: choose from {', '.join(known)}")
    variants: dict[str, LM] = {}
    missing: dict[str, str] = {}
    for kind in known if kinds is None else kinds:
        tell(kind)
        try:
            # Quantised weights are multiplied on the backend that "auto" chooses for the other layers.
            variant = target.quantized(kind).with_backend("auto") if kind in KINDS else target.with_backend(kind)
        except (UnsupportedModelError, ValueError) as error:
            missing[kind] = str(error)
            continue
        if kind in (variant.backend.name, *KINDS):
            variants[kind] = variant
        else:
            missing[kind] = re.sub(r"^not \w+: ", "", variant.backend.note)
    return variants, missing


def measure_roofline(target: LM, tell: Callable[[int, int, str], None], kinds: Sequence[str] | None = None) -> Roofline:
    """Time the target's forwards on all backends, and with quantised weights, in turn.

    Args:
        target: a model on the backend "eager".
        tell: called with the number of finished rounds, the number of all rounds, and a text on the current step.
        kinds: the backends and the kinds of quantised weights to time; all if None.

    Raises:
        ValueError: there is no such kind.
    """
    variants, missing = prepare_variants(target, kinds, lambda kind: tell(0, _ROUNDS, f"preparing {kind}"))
    bandwidth = read_bandwidth(target.device)
    seconds = forward_seconds(list(variants.values()), (1, *WIDER), repeats=_ROUNDS, seconds=_LIMIT_S, tell=tell)
    backends = {}
    for (kind, variant), by_rows in zip(variants.items(), seconds, strict=True):
        tell(_ROUNDS, _ROUNDS, f"layers of {kind}")
        row = None
        if variant.backend.static is None and variant.ranks.count == 1:
            row = layer_seconds(variant, repeats=_ROUNDS, seconds=_LAYERS_LIMIT_S)
        backends[kind] = BackendForwards(variant.weight_bytes, by_rows, row)
    return Roofline(bandwidth, token_bytes(target, cached_tokens(target, WIDER[-1])), backends, missing)
