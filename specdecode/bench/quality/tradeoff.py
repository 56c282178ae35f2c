"""Compare quality with speed: a run of `pytest --quality` with one of `pytest --benchmark`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdecode.bench.arms.keys import POLICY_CACHE_TOKENS
from specdecode.bench.report.captions import label, title
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import Estimate
from specdecode.evals.results import MEASURES, QualityRun

NO_COST = Estimate(0.0, 0.0, 0.0)
"""The cost of decoding with the whole cache and the weights as they are, which is the reference."""


@dataclass(frozen=True, slots=True)
class Point:
    """An arm whose speed and whose cost are known.

    Attributes:
        arm: of the run of speeds.
        judged: the arm of the quality run that decodes its target alike; None where nothing is lost.
        speedup: over `ar`.
        cost: ΔNLL, in nats a token.
    """

    arm: str
    judged: str | None
    speedup: Estimate
    cost: Estimate


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """What two runs say together.

    Attributes:
        points: of the arms that both know, in the order of the run of speeds.
        unjudged: arms of that run whose cost the quality run does not have.
        unmeasured: arms of the quality run, but for its controls, as none of the other run decodes.
    """

    points: list[Point]
    unjudged: list[str]
    unmeasured: list[str]

    @property
    def drawable(self) -> list[Point]:
        """The points whose speedup is known; none unless one of them is lossy."""
        known = [point for point in self.points if math.isfinite(point.speedup.value)]
        return known if any(point.judged for point in known) else []


def tradeoff(run: QualityRun, speed: RunFile) -> Tradeoff:
    """Join two runs by how the target is decoded: its cache policy, cache size and weights.

    How drafts are made changes the speed alone.

    Raises:
        ValueError: the runs are of different targets or types.
    """
    header, identity = run.header, speed.header.identity
    if (header.target, header.dtype) != (identity.target, identity.dtype):
        raise ValueError(
            f"quality was judged of {header.target} in {header.dtype}, and speed was measured of"
            f" {identity.target} in {identity.dtype}: give runs of the same target and type"
        )
    judged: dict[str, str] = {}
    for arm in run.judged_arms:
        judged.setdefault(_decoding(run.arms[arm]), arm)
    points, unjudged, measured = [], [], set()
    for arm, record in speed.arms.items():
        if not record.rows:
            continue
        decoding = _decoding({key: record.options[key] for key in _LOSSES if key in record.options})
        measured.add(decoding)
        if not record.lossy:
            points.append(Point(arm, None, speed.speedup(arm), NO_COST))
        # Older files do not tell what a lossy arm loses.
        elif decoding != _WHOLE and decoding in judged and (cost := run.cost(judged[decoding], "nll")):
            points.append(Point(arm, judged[decoding], speed.speedup(arm), cost))
        else:
            unjudged.append(arm)
    alone = [arm for arm, entry in run.arms.items() if "control" not in entry and _decoding(entry) not in measured]
    return Tradeoff(points, unjudged, [arm for arm in alone if _decoding(run.arms[arm]) != _WHOLE])


_LOSSES = ("policy", "cache", "quantize")


def _decoding(entry: Mapping[str, Any]) -> str:
    """Return how an entry of either suite decodes its target, as a text that is equal where that is."""
    settings = {key: value for key, value in entry.items() if key not in ("k", "control")}
    if "policy" in settings:
        settings.setdefault("cache", POLICY_CACHE_TOKENS)
    else:
        settings.pop("cache", None)
    return json.dumps(settings, sort_keys=True)


_WHOLE = _decoding({})


def against_speed(run: QualityRun, speed: RunFile) -> Grid:
    """Make one row an arm that both runs know: its speedup, and what it costs."""
    heads = [Column("arm", False), Column("judged as", False), Column("speedup over ar")]
    columns = [*heads, *map(Column, (*MEASURES.values(), "PPL"))]
    rows = []
    for point in tradeoff(run, speed).points:
        divergence = NO_COST if point.judged is None else run.cost(point.judged, "kl")
        costs = [f"{cost:.4f}" if cost else "" for cost in (point.cost, divergence)]
        cells = [f"{point.speedup}", *costs, f"{run.perplexity(point.judged):.3f}"]
        rows.append([label(speed, point.arm), point.judged or "reference", *cells])
    return Grid(columns, rows)


def about_speed(run: QualityRun, speed: RunFile) -> list[str]:
    """Say what that table does not show by itself."""
    compared = tradeoff(run, speed)
    sentences = [
        f"Speeds: {title(speed)}. An arm costs what its cache and its weights cost, however drafts are made; what loses"
        " nothing decodes as the reference does. Both intervals are of 95 %."
    ]
    if compared.unjudged:
        sentences.append(f"Measured, but not judged: {', '.join(compared.unjudged)}.")
    if compared.unmeasured:
        sentences.append(f"Judged, but not measured: {', '.join(compared.unmeasured)}.")
    return sentences
