"""Quality against speed, from a run of `pytest --quality` and a run of `pytest --benchmark`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdecode.bench.arms.keys import POLICY_CACHE_TOKENS, loss_settings
from specdecode.bench.report.captions import label, title
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import Estimate
from specdecode.evals.results import MEASURES, QualityRun

NO_COST = Estimate(0.0, 0.0, 0.0)
"""The cost of the reference: decoding with the full cache and unquantised weights."""


@dataclass(frozen=True, slots=True)
class Point:
    """An arm with a known speed and a known cost.

    Attributes:
        arm: name of the arm in the run of speeds.
        judged: the quality run's arm with the same target settings; None for a lossless arm.
        speedup: speedup over the reference arm of the run of speeds.
        cost: ΔNLL, in nats a token.
    """

    arm: str
    judged: str | None
    speedup: Estimate
    cost: Estimate


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """A run of speeds and a quality run, joined.

    Attributes:
        points: points of the arms in both runs, in the order of the run of speeds.
        unjudged: arms of the run of speeds without a cost in the quality run.
        faulty: arms of the run of speeds that failed or wrote a wrong output, so that their times are void.
        unmeasured: arms of the quality run, except controls, without an arm of the same target settings in the run of
            speeds.
    """

    points: list[Point]
    unjudged: list[str]
    faulty: list[str]
    unmeasured: list[str]

    @property
    def drawable(self) -> list[Point]:
        """The points with a known speedup; none if all of them are lossless."""
        known = [point for point in self.points if math.isfinite(point.speedup.value)]
        return known if any(point.judged for point in known) else []


def tradeoff(run: QualityRun, speed: RunFile) -> Tradeoff:
    """Join two runs by the settings of their target: cache policy, cache size and weights.

    Drafts change only the speed.

    Raises:
        ValueError: the runs have different targets or data types.
    """
    header, identity = run.header, speed.header.identity
    if (header.target, header.dtype) != (identity.target, identity.dtype):
        raise ValueError(
            f"quality was judged for {header.target} in {header.dtype}, but speed was measured for"
            f" {identity.target} in {identity.dtype}: give runs of the same target and type"
        )
    judged: dict[str, str] = {}
    for arm in run.judged_arms:
        judged.setdefault(_decoding(run.arms[arm]), arm)
    points, unjudged, faulty, measured = [], [], [], set()
    for arm, record in speed.arms.items():
        if record.faulty:
            faulty.append(arm)
            continue
        if not record.rows:
            continue
        # One reference arm for all, whatever arm each is compared with elsewhere.
        speedup = speed.speedup(arm, speed.header.baseline)
        decoding = _decoding(loss_settings(record.options))
        measured.add(decoding)
        if not record.lossy:
            points.append(Point(arm, None, speedup, NO_COST))
        # Older files do not record the settings that make an arm lossy.
        elif decoding != _WHOLE and decoding in judged and (cost := run.cost(judged[decoding], "nll")):
            points.append(Point(arm, judged[decoding], speedup, cost))
        else:
            unjudged.append(arm)
    alone = [arm for arm, entry in run.arms.items() if "control" not in entry and _decoding(entry) not in measured]
    return Tradeoff(points, unjudged, faulty, [arm for arm in alone if _decoding(run.arms[arm]) != _WHOLE])


def _decoding(entry: Mapping[str, Any]) -> str:
    """Return the target settings of an entry of either suite, as a text that is equal for equal settings."""
    settings = {key: value for key, value in entry.items() if key not in ("k", "control")}
    if "policy" in settings:
        settings.setdefault("cache", POLICY_CACHE_TOKENS)
    else:
        settings.pop("cache", None)
    return json.dumps(settings, sort_keys=True)


_WHOLE = _decoding({})


COST_COLUMNS = {
    "ppl": Column("PPL", about="perplexity, over all tokens"),
    "nll": Column("ΔNLL", about="nats a token by which the text is less probable, with a 95 % interval over documents"),
    "kl": Column("KL", about="KL(reference || arm) in nats a token, with a 95 % interval over documents"),
}
"""The columns of perplexity and of MEASURES."""


def against_speed(run: QualityRun, speed: RunFile) -> Grid:
    """Build one row for each arm in both runs: its speedup and its costs."""
    about = "the arm of the quality suite with the same cache and weights"
    heads = [Column("arm", False), Column("judged as", False, about=about)]
    heads.append(Column(f"speedup over {speed.header.baseline}", about="with its 95 % interval"))
    columns = [*heads, *(COST_COLUMNS[measure] for measure in (*MEASURES, "ppl"))]
    rows = []
    for point in tradeoff(run, speed).points:
        divergence = NO_COST if point.judged is None else run.cost(point.judged, "kl")
        costs = [f"{cost:.4f}" if cost else "" for cost in (point.cost, divergence)]
        cells = [f"{point.speedup}", *costs, f"{run.perplexity(point.judged):.3f}"]
        rows.append([label(speed, point.arm), point.judged or "reference", *cells])
    return Grid(columns, rows)


def about_speed(run: QualityRun, speed: RunFile) -> list[str]:
    """Return the notes on the table of `against_speed`."""
    compared = tradeoff(run, speed)
    sentences = [
        f"Speeds: {title(speed)}. The cost of an arm is the cost of its cache and its weights; drafts do not change it."
        " A lossless arm costs nothing."
    ]
    if compared.unjudged:
        sentences.append(f"Measured, but not judged: {', '.join(compared.unjudged)}.")
    if compared.faulty:
        sentences.append(f"Left out, as they failed or wrote a wrong output: {', '.join(compared.faulty)}.")
    if compared.unmeasured:
        sentences.append(f"Judged, but not measured: {', '.join(compared.unmeasured)}.")
    return sentences
