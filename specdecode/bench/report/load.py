"""Comparison of servers' arms by concurrency, the number of prompts decoded at a time."""

from __future__ import annotations

import math

from specdecode.bench.report.captions import cells, columns, output_column, outputs
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.palette import base_name, concurrency, settings
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import UNKNOWN, Estimate


def families(run: RunFile) -> dict[str, dict[int, str]]:
    """Group the arms that differ only in concurrency: for each base name its arms by concurrency, lowest first."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for arm, record in run.arms.items():
        key = base_name(run, arm), settings(record, "concurrency", "requests", "baseline")
        groups.setdefault(key, {})[concurrency(run, arm)] = arm
    return {name: dict(sorted(arms.items())) for (name, _), arms in groups.items() if len(arms) > 1}


def scales(run: RunFile, arm: str) -> bool:
    """Return whether the arm differs from its reference arm only in concurrency: its speedup is no gain by drafts."""
    baseline = run.baseline_of(arm)
    return arm != baseline and baseline in run.arms and base_name(run, arm) == base_name(run, baseline)


def gains(run: RunFile) -> dict[str, dict[int, Estimate]]:
    """Return the speedups of each drafting arm by concurrency, over its reference arm at the same concurrency.

    A speedup is nan if an output was wrong, if the arm failed, or without such a reference arm.
    """
    by_family = {}
    for name, arms in families(run).items():
        compared = {number: arm for number, arm in arms.items() if _is_compared(run, arm)}
        if compared:
            by_family[name] = {
                number: run.speedup(arm) if number in compared and not run.arms[arm].faulty else UNKNOWN
                for number, arm in arms.items()
            }
    return by_family


def _is_compared(run: RunFile, arm: str) -> bool:
    """Return whether the arm's reference arm is another arm of the same concurrency."""
    baseline = run.baseline_of(arm)
    return arm != baseline and baseline in run.arms and concurrency(run, arm) == concurrency(run, baseline)


def by_concurrency(run: RunFile) -> Grid:
    """Build one row for each arm and concurrency; none if no arms differ only in concurrency."""
    measured = ["throughput", "speedup", "mean_acceptance_length", "ttft_s", "ttft_p95_s", "tpot_s", "tpot_p95_s"]
    rows, listed = [], []
    for name, arms in families(run).items():
        for number, arm in arms.items():
            named = f"{name} (synthetic)" if run.arms[arm].synthetic else name
            rows.append([named, str(number), *cells(run, arm, measured), outputs(run, arm)])
            listed.append(arm)
    about = "prompts at a time; a drafting arm is compared with its reference arm at the same concurrency"
    heads = [Column("arm", figures=False), Column("concurrency", about=about)]
    return Grid([*heads, *columns(run, measured), output_column(run, listed)], rows)


def losses(run: RunFile) -> list[str]:
    """Return a sentence for each drafting arm: the concurrencies at which it gains and loses."""
    return [f"{name}: {_verdict(speedups)}." for name, speedups in gains(run).items()]


def _verdict(speedups: dict[int, Estimate]) -> str:
    """Return the concurrencies at which the whole interval is below 1, above 1, or neither, in words."""
    gained = [number for number, speedup in speedups.items() if speedup.low > 1.0]
    lost = [number for number, speedup in speedups.items() if speedup.high < 1.0]
    unknown = [number for number, speedup in speedups.items() if not math.isfinite(speedup.value)]
    unclear = [number for number in speedups if number not in (*gained, *lost, *unknown)]
    if len(gained) == len(speedups):
        return "gains at every concurrency that was measured"
    parts = []
    if lost and not any(number > lost[0] for number in (*gained, *unclear, *unknown)):
        parts.append(f"loses from {lost[0]} prompt{'s' if lost[0] > 1 else ''} at a time on")
    elif lost:
        parts.append(f"loses at {_listed(lost)}")
    if gained:
        parts.append(f"gains at {_listed(gained)}")
    if unclear:
        parts.append(f"the runs can't tell at {_listed(unclear)}")
    if unknown:
        parts.append(f"nothing is known at {_listed(unknown)}")
    return "; ".join(parts)


def _listed(numbers: list[int]) -> str:
    """Return numbers as a list in words: "1, 4 and 16"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
