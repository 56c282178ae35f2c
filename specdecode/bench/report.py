"""Tables of results."""

from __future__ import annotations

import math

from rich.table import Table

from specdecode.bench.measure import Results

_HF_BASELINE = "hf-generate"


def speed_table(results: Results) -> Table:
    """One row an arm: throughput, speedups with their 95 % intervals, latency, acceptance, output check."""
    table = Table(caption_justify="left")
    against_hf = _HF_BASELINE in results.runs
    table.add_column("arm", no_wrap=True)
    for column in ("tokens/s", "speedup over ar", *(["over hf-generate"] if against_hf else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("TTFT ms", "TPOT ms", "τ", "acceptance", "tokens"):
        table.add_column(column, justify="right")
    for arm in results.runs:
        measures = results.measures(arm)
        verdict = "WRONG" if measures["bugs"] else f"{measures['ties']:.0f} ties" if measures["ties"] else "equal"
        table.add_row(
            arm,
            f"{measures['throughput']:.1f}",
            str(results.speedup(arm)),
            *([str(results.speedup(arm, over=_HF_BASELINE))] if against_hf else []),
            f"{1e3 * measures['ttft_s']:.0f}",
            f"{1e3 * measures['tpot_s']:.1f}",
            f"{measures['mean_acceptance_length']:.2f}",
            f"{measures['acceptance_rate']:.0%}" if "acceptance_rate" in measures else "",
            verdict,
        )
    floor = 100 * math.expm1(results.floor)
    table.caption = (
        f"Baseline ar: autoregressive decoding by this package; intervals are 95 %. A/A floor: two runs of ar differ by"
        f" up to {floor:.1f} % in the mean."
    )
    return table
