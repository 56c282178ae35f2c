"""Recommendations as text for a terminal, and as JSON for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from specdecode.bench.report.captions import COLUMNS, cells, columns, label, output_column, outputs, title
from specdecode.bench.report.contest import Recommendation
from specdecode.bench.report.grid import Column, Grid, rich_table
from specdecode.bench.report.recommend import Advice
from specdecode.bench.runs.counts import as_dict
from specdecode.bench.runs.names import BASELINE, PEER_BASELINE
from specdecode.bench.runs.records import RunFile


def rich_advice(run: RunFile, advice: Advice) -> RenderableType:
    """Return the advice for a terminal, to be printed without cropping."""
    parts: list[RenderableType] = [Text(title(run)), rich_table(_table(run, advice))]
    aims_by_code: dict[str, str] = {}
    for recommendation in advice.recommendations:
        aim, code = _aim(recommendation), recommendation.code
        parts += ["", Text.assemble((aim, "bold"), f": {recommendation.arm or 'not known'}")]
        parts += [Padding(Text(line), (0, 0, 0, 2), expand=False) for line in sentences(recommendation)]
        if code in aims_by_code:
            parts.append(
                Padding(Text(f"The code is the same as for {aims_by_code[code]}."), (0, 0, 0, 2), expand=False)
            )
        elif code:
            aims_by_code[code] = aim
            # Neither indented nor broken, so that it can be copied.
            parts += ["", Text(code, style="cyan", no_wrap=True, overflow="ignore")]
    arms_by_reason: dict[str, list[str]] = {}
    for arm, reason in advice.left_out.items():
        arms_by_reason.setdefault(reason, []).append(arm)
    left_out = [f"Left out: {', '.join(arms)}: {reason}." for reason, arms in arms_by_reason.items()]
    return Group(*parts, "", *map(Text, [*left_out, *advice.notes]))


def _table(run: RunFile, advice: Advice) -> Grid:
    """Build one row for each aim: the arm, its speed over `ar` and transformers, and its measures."""
    measured = ["throughput", "mean_acceptance_length", "acceptance_rate", "peak_cache_bytes"]
    compared = "speed over plain decoding, and its interval"
    over = {BASELINE: Column("over ar", about=compared), PEER_BASELINE: COLUMNS["over_hf"]}
    if PEER_BASELINE not in run.arms:
        del over[PEER_BASELINE]
    arms = [recommendation.arm for recommendation in advice.recommendations if recommendation.arm is not None]
    heads = [Column("aim", False, True), Column("use", False), *over.values(), *columns(run, measured)]
    rows = []
    for recommendation in advice.recommendations:
        aim, arm = _aim(recommendation), recommendation.arm
        if arm is None:
            rows.append([aim, "-", *[""] * (len(heads) - 1)])
            continue
        ratios = [_over(recommendation, recommendation.plain if other == BASELINE else other) for other in over]
        rows.append([aim, label(run, arm), *ratios, *cells(run, arm, measured), outputs(run, arm)])
    return Grid([*heads, output_column(run, arms)], rows)


def _over(recommendation: Recommendation, other: str) -> str:
    """Return the speed over another arm, with that arm's name if the column does not name it."""
    if other not in recommendation.over:
        return ""
    named = "" if other in (BASELINE, PEER_BASELINE) else f" over {other}"
    return f"{recommendation.over[other]}{named}"


def _aim(recommendation: Recommendation) -> str:
    if recommendation.assumed is None:
        return recommendation.aim
    return f"{recommendation.aim}, if {recommendation.assumed:.0%} is accepted"


def sentences(recommendation: Recommendation) -> list[str]:
    """Return the reason for a recommendation, and the arms that it beats or ties with."""
    reasons = [recommendation.reason]
    if recommendation.beats:
        nearest_first = sorted(recommendation.beats.items(), key=lambda pair: pair[1].value)
        ratios = ", ".join(f"{arm}: {ratio}" for arm, ratio in nearest_first)
        reasons.append(f"It beats these arms, with its speed over theirs: {ratios}.")
    if recommendation.tied:
        fastest_first = sorted(recommendation.tied.items(), key=lambda pair: -pair[1].value)
        ratios = ", ".join(f"{arm}: {ratio}" for arm, ratio in fastest_first)
        reasons.append(f"It ties with these arms, with their speed over its own: {ratios}. {recommendation.settle}")
    return reasons


def as_json(run: RunFile, advice: Advice) -> dict[str, Any]:
    """Return the advice as plain JSON values, with null for unknown ones."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    recommendations = [
        {
            **plain(asdict(recommendation)),
            "measures": {} if recommendation.arm is None else as_dict(run.measures(recommendation.arm)),
        }
        for recommendation in advice.recommendations
    ]
    return {
        "run": title(run),
        "recommendations": recommendations,
        "left_out": advice.left_out,
        "notes": advice.notes,
    }
