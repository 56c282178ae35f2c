"""Tables of results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from specdecode.bench.gate import Judgement, Verdict
from specdecode.bench.measure import Results
from specdecode.bench.names import PEER_BASELINE


def speed_table(results: Results) -> Table:
    """One row an arm: throughput, speedups with their 95 % intervals, latency, acceptance, output check."""
    table = Table(caption_justify="left")
    against_hf = PEER_BASELINE in results.runs
    table.add_column("arm", no_wrap=True)
    for column in ("tokens/s", "speedup over ar", *(["over hf-generate"] if against_hf else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("TTFT ms", "TPOT ms", "τ", "acceptance", "tokens"):
        table.add_column(column, justify="right")
    for arm in results.runs:
        measures = results.measures(arm)
        table.add_row(
            _label(results, arm),
            f"{measures['throughput']:.1f}",
            str(results.speedup(arm)),
            *([str(results.speedup(arm, over=PEER_BASELINE))] if against_hf else []),
            f"{1e3 * measures['ttft_s']:.0f}",
            f"{1e3 * measures['tpot_s']:.1f}",
            f"{measures['mean_acceptance_length']:.2f}",
            f"{measures['acceptance_rate']:.0%}" if "acceptance_rate" in measures else "",
            _outputs(measures),
        )
    floor = 100 * math.expm1(results.floor)
    peers = [f"{arm} over {peer} {results.speedup(arm, over=peer)}" for arm, peer in results.against.items()]
    notes = [
        "Baseline ar: autoregressive decoding by this package. Intervals are 95 %.",
        f"A/A floor: two runs of ar differ by up to {floor:.1f} % in the mean.",
    ]
    if peers:
        notes.append(f"Against transformers, same draft and settings: {'; '.join(peers)}.")
    table.caption = "\n".join(notes)
    return table


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """One row a verdict, the failing ones first."""
    table = Table()
    table.add_column("verdict", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    table.add_column("of", no_wrap=True)
    table.add_column("why")
    for judged in _failing_first(judgements):
        table.add_row(judged.verdict.value, judged.arm, judged.gate, judged.reason)
    return table


def markdown(results: Results, title: str, baseline: str, judgements: Sequence[Judgement]) -> str:
    """A page for a merge request: verdicts first, then speeds."""
    lines = [f"## {title}", "", baseline, ""]
    if judgements:
        lines += ["| verdict | arm | of | why |", "|---|---|---|---|"]
        lines += [f"| {j.verdict.value} | {j.arm} | {j.gate} | {j.reason} |" for j in _failing_first(judgements)]
        lines.append("")
    lines += ["| arm | tokens/s | speedup over ar | τ | outputs |", "|---|--:|--:|--:|---|"]
    for arm in results.runs:
        measures = results.measures(arm)
        tau, speed = measures["mean_acceptance_length"], measures["throughput"]
        lines.append(
            f"| {_label(results, arm)} | {speed:.1f} | {results.speedup(arm)} | {tau:.2f} | {_outputs(measures)} |"
        )
    return "\n".join(lines) + "\n"


def _failing_first(judgements: Sequence[Judgement]) -> list[Judgement]:
    order = [Verdict.REGRESSED, Verdict.MISSING, Verdict.INCONCLUSIVE, Verdict.NO_BASELINE, Verdict.WRONG_HARDWARE]
    ranks = {verdict: rank for rank, verdict in enumerate(order)}
    return sorted(judgements, key=lambda judged: ranks.get(judged.verdict, len(order)))


def _label(results: Results, arm: str) -> str:
    return f"{arm} (synthetic)" if arm in results.synthetic else arm


def _outputs(measures: dict[str, float]) -> str:
    if measures["bugs"]:
        return "WRONG"
    return f"{measures['ties']:.0f} ties" if measures["ties"] else "equal"
