"""Compare the arms of servers by their concurrency: how many prompts they decode at a time."""

from __future__ import annotations

import math

from specdecode.bench.report.captions import cells
from specdecode.bench.report.grid import Column, Grid
from specdecode.bench.report.palette import base_name, concurrency, settings
from specdecode.bench.runs.records import RunFile
from specdecode.bench.runs.statistics import UNKNOWN, Estimate

LOAD = (
    "Tokens/s are those of all prompts together. TTFT and TPOT are those of a single request: the median, and what 95 %"
    " of the requests do not exceed. A speculating arm is compared with the arm of its baseline that decodes as many"
    " prompts at a time."
)
"""What a table by concurrency does not say by itself."""


def families(run: RunFile) -> dict[str, dict[int, str]]:
    """Group the arms that differ in concurrency alone: for each base name its arms by concurrency, the least first."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for arm, record in run.arms.items():
        key = base_name(run, arm), settings(record, "concurrency", "requests", "baseline")
        groups.setdefault(key, {})[concurrency(run, arm)] = arm
    return {name: dict(sorted(arms.items())) for (name, _), arms in groups.items() if len(arms) > 1}


def scales(run: RunFile, arm: str) -> bool:
    """Return whether the arm differs from its baseline in concurrency alone: its speedup is no gain by drafts."""
    baseline = run.baseline_of(arm)
    return arm != baseline and baseline in run.arms and base_name(run, arm) == base_name(run, baseline)


def gains(run: RunFile) -> dict[str, dict[int, Estimate]]:
    """Return the speedups of each speculating arm by concurrency, over its baseline at the same concurrency.

    A speedup is nan where no output was right, and where there is no such baseline.
    """
    found = {}
    for name, arms in families(run).items():
        compared = {number: arm for number, arm in arms.items() if _is_compared(run, arm)}
        if compared:
            found[name] = {number: run.speedup(arm) if number in compared else UNKNOWN for number, arm in arms.items()}
    return found


def _is_compared(run: RunFile, arm: str) -> bool:
    """Return whether the arm has a baseline of its concurrency that is another arm."""
    baseline = run.baseline_of(arm)
    return arm != baseline and baseline in run.arms and concurrency(run, arm) == concurrency(run, baseline)


def by_concurrency(run: RunFile) -> Grid:
    """Make one row for each arm and concurrency; none where no arms differ in it alone."""
    measured = {
        "throughput": Column("tokens/s"),
        "speedup": Column(f"speedup over {run.header.baseline}"),
        "mean_acceptance_length": Column("τ"),
        "ttft_s": Column("TTFT ms", breaks=True),
        "ttft_p95_s": Column("TTFT p95 ms", breaks=True),
        "tpot_s": Column("TPOT ms", breaks=True),
        "tpot_p95_s": Column("TPOT p95 ms", breaks=True),
    }
    rows = [
        [f"{name} (synthetic)" if run.arms[arm].synthetic else name, str(number), *cells(run, arm, list(measured))]
        for name, arms in families(run).items()
        for number, arm in arms.items()
    ]
    return Grid([Column("arm", figures=False), Column("concurrency"), *measured.values()], rows)


def losses(run: RunFile) -> list[str]:
    """Say of each speculating arm from which concurrency on it loses, in a sentence."""
    return [f"{name}: {_verdict(speedups)}." for name, speedups in gains(run).items()]


def _verdict(speedups: dict[int, Estimate]) -> str:
    """Say at which concurrency the whole interval is below 1, where it is above, and where it is neither."""
    gained = [number for number, speedup in speedups.items() if speedup.low > 1.0]
    lost = [number for number, speedup in speedups.items() if speedup.high < 1.0]
    unknown = [number for number, speedup in speedups.items() if not math.isfinite(speedup.value)]
    unclear = [number for number in speedups if number not in (*gained, *lost, *unknown)]
    if len(gained) == len(speedups):
        return "gains at every concurrency that was measured"
    parts = []
    if lost and not any(number > lost[0] for number in gained):
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
    """List numbers in words: "1, 4 and 16"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
