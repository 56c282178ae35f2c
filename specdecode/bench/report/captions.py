"""The words of tables: names of runs and arms, values as text, and notes."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.presets import built_in
from specdecode.bench.runs.measures import Measures
from specdecode.bench.runs.names import BASELINE, FLAGS, OWN_TYPE, PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, Identity, RunFile

LOOPS = 0.5
"""The share of 4-grams that stood in the output before from which on it is told to loop."""

MEMORY = (
    "Weights are the target's, as they are stored; KV is the most that was held of keys and values, and its growth by"
    " how much that is more than after the first step; evictions are a run's; the peak is the most that was held at"
    " once in a short run, above all loaded weights."
)
"""What a table of memory does not say by itself."""


MODEL = (
    "Alpha is the probability that a proposal is accepted once those before it were. The study's approximation is"
    " (1 + K alpha) / (1 + K T_draft / T_target); the exact expectation is a chain's (Leviathan et al. 2023), with the"
    " depths and the costs that were measured; from steps is what the steps really gave, without overhead."
)
"""What a table of models does not say by itself."""

LIMITS = (
    "The speedup over the baseline, of all tokens together, as a product: how many fewer steps the acceptance length"
    " asks for, and what drafting, verifying a draft and overhead leave of that, or the time a step where nobody"
    " timed these parts. A factor of 0.80 costs a fifth of the speed."
)
"""What a table of limits does not say by itself."""


# What an entry of a preset says of the target that is decoded, and not of how drafts are made.
_LOSS = ("policy", "cache", "quantize", "backend")


def title(run: RunFile) -> str:
    """Name the models, and what the experiment is."""
    identity = run.header.identity
    size = f"{len(run.header.outputs)} prompts x {run.header.max_new_tokens} tokens"
    return f"{models(run)}, {type_of(identity)} on {identity.hardware}, preset {identity.preset}, {size}"


def type_of(identity: Identity) -> str:
    """Name the type of the weights."""
    return "a type that its servers choose" if identity.dtype == OWN_TYPE else identity.dtype


def models(run: RunFile) -> str:
    """Name the target, and the draft if there is one."""
    identity = run.header.identity
    return f"{identity.target} with {identity.draft}" if identity.draft else identity.target


def judged_by(run: RunFile, old: RunFile | None, expected: Path) -> str:
    """Say what the verdicts compare with.

    Args:
        run: that is judged.
        old: its baseline.
        expected: where there would be one.
    """
    if old is None:
        return f"No baseline for this hardware: {expected} is not there, so nothing was judged."
    text = f"Judged by {old.path}"
    text += f", of {old.date}: {old.reason}." if old.reason else "."
    ours, theirs = run.header, old.header
    if theirs.identity.hardware != ours.identity.hardware:
        text += " It is another machine's: counters are judged, times are not."
    different = [
        f"{name} {theirs.versions[name]} -> {value}"
        for name, value in ours.versions.items()
        if theirs.versions.get(name, value) != value
    ]
    return text + (f" What is not as it was: {', '.join(different)}." if different else "")


def command(run: RunFile) -> str:
    """Return the command that measures the same again, as far as the file tells."""
    identity, header = run.header.identity, run.header
    sets = Counter(prompt.rpartition("/")[0] for prompt in header.outputs)
    repeats = max((row.counts.runs for record in run.arms.values() for row in record.rows.values()), default=1)
    flags = [flag for flag in FLAGS if flag in identity.preset.split(".")[1:]]
    preset = identity.preset.removesuffix("".join(f".{flag}" for flag in flags))
    options = {
        "preset": preset if preset in built_in() else f"{preset}.toml",
        "target": identity.target,
        "draft": identity.draft,
        "device": "cuda" if header.on_gpu else "cpu",
        "dtype": "" if identity.dtype == OWN_TYPE else identity.dtype,
        "tp": "auto" if header.processes > 1 else "",
        "prompts": ",".join(f"{name}:{count}" for name, count in sets.items()),
        "max-new-tokens": str(header.max_new_tokens),
        "repeats": f"{repeats:.0f}",
    }
    arguments = [f"--{option}={value}" for option, value in options.items() if value]
    processes = ["torchrun", f"--nproc-per-node={header.processes}", "-m"] if header.processes > 1 else []
    return shlex.join([*processes, "pytest", "--benchmark", *arguments, *(f"--{flag}" for flag in flags)])


Cell = Callable[[RunFile, str], str]
"""What a table says of an arm of a run; empty where nothing is known."""


def _measure(value: Callable[[Measures], float | None], write: Callable[[float], str]) -> Cell:
    def cell(run: RunFile, arm: str) -> str:
        known = value(run.measures(arm))
        return "" if known is None else write(known)

    return cell


def _throughput(run: RunFile, arm: str) -> str:
    """Return the tokens per second, with the standard deviation between prompts where there are several."""
    measures = run.measures(arm)
    return " ± ".join(f"{value:.1f}" for value in (measures.throughput, measures.throughput_std) if value is not None)


def _speedup(over: str) -> Cell:
    return lambda run, arm: f"{run.speedup(arm, over)}" if run.log_speedups(arm, over) else ""


def _own_speedup(run: RunFile, arm: str) -> str:
    """Return the speedup over the arm's baseline, which is named where it is not the run's."""
    baseline = run.baseline_of(arm)
    speedup = _speedup(baseline)(run, arm)
    return f"{speedup} over {baseline}" if speedup and baseline != run.header.baseline else speedup


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}"


CELLS: dict[str, Cell] = {
    "throughput": _throughput,
    "speedup": _own_speedup,
    "over_hf": _speedup(over=PEER_BASELINE),
    "predicted_speedup": _measure(lambda arm: arm.predicted_speedup, "{:.2f}".format),
    "ttft_s": _measure(lambda arm: arm.ttft_s, lambda seconds: f"{1e3 * seconds:.0f}"),
    "ttft_p95_s": _measure(lambda arm: arm.ttft_p95_s, lambda seconds: f"{1e3 * seconds:.0f}"),
    "tpot_s": _measure(lambda arm: arm.tpot_s, lambda seconds: f"{1e3 * seconds:.1f}"),
    "tpot_p95_s": _measure(lambda arm: arm.tpot_p95_s, lambda seconds: f"{1e3 * seconds:.1f}"),
    "mean_acceptance_length": _measure(lambda arm: arm.counters.mean_acceptance_length, "{:.2f}".format),
    "acceptance_rate": _measure(lambda arm: arm.counters.acceptance_rate, "{:.0%}".format),
    "roofline_share": _measure(lambda arm: arm.roofline_share, "{:.0%}".format),
    "weight_bytes": _measure(lambda arm: arm.counters_run.weight_bytes, _megabytes),
    "peak_cache_bytes": _measure(lambda arm: arm.counters.peak_cache_bytes, _megabytes),
    "peak_bytes": _measure(lambda arm: arm.counters_run.peak_bytes, _megabytes),
    "grown_bytes": _measure(lambda arm: arm.grown_bytes, _megabytes),
    "compressions": _measure(lambda arm: arm.counters.compressions, "{:.1f}".format),
    "agreement": _measure(lambda arm: arm.agreement, "{:.0%}".format),
    "self_ppl": _measure(lambda arm: arm.self_ppl, "{:.2f}".format),
    "repetition": _measure(lambda arm: arm.repetition, "{:.0%}".format),
}
"""The columns of tables, by name."""


def cells(run: RunFile, arm: str, columns: Sequence[str]) -> list[str]:
    """Return columns of `CELLS` for an arm."""
    return [CELLS[column](run, arm) for column in columns]


def notes(run: RunFile) -> list[str]:
    """Say what a table of speeds does not show by itself."""
    baseline = run.header.baseline
    options = run.arms[baseline].options if baseline in run.arms else {}
    plainly = ": autoregressive decoding by this package" if baseline == BASELINE else ""
    if {"server", "call"} & options.keys():
        plainly = ", which a server decodes" if "server" in options else ", which code outside of this package decodes"
    sentences = [
        f"Baseline {baseline}{plainly}. {_intervals(run)}",
        f"A/A floor: two runs of {baseline} differ by up to {math.expm1(run.header.floor):.1%} on average."
        f"{_disturbances(run)}",
    ]
    if run.header.roofline:
        sentences.append(
            "Predicted: from acceptance and forwards, without overhead. Roofline: share of the speed at which memory"
            " can stream the weights, and the keys and values of a prompt of mean length:"
            f" {run.header.roofline:.0f} tokens/s."
        )
    peers = {arm: record.against for arm, record in run.arms.items() if record.against}
    if compared := {arm: peer for arm, peer in peers.items() if run.log_speedups(arm, over=peer)}:
        ratios = "; ".join(f"{arm} over {peer} {run.speedup(arm, over=peer)}" for arm, peer in compared.items())
        sentences.append(f"Against transformers, same draft and settings: {ratios}.")
    replayed = {arm: record.ties for arm, record in run.arms.items() if "replay" in record.options and record.ties}
    if replayed:
        left = ", ".join(f"{arm} ({ties})" for arm, ties in replayed.items())
        sentences.append(
            f"Outputs that left the replayed text at a tie: {left}. Behind it fewer proposals may have been right than"
            " were to be."
        )
    if any(record.lossy for record in run.arms.values()):
        sentences.append(
            "Lossy: checked against plain decoding with the same cache and the same weights; from code that says so of"
            " itself: not checked. The share is that of its tokens that come before it leaves its baseline's output."
        )
    bases = {arm: base for arm in run.arms if (base := plain(run, arm)) is not None}
    if bases := {arm: base for arm, base in bases.items() if run.log_speedups(arm, over=base)}:
        ratios = "; ".join(f"{arm} over {base} {run.speedup(arm, over=base)}" for arm, base in bases.items())
        sentences.append(f"Against plain decoding with the same loss: {ratios}.")
    if any(run.measures(arm).repetition is not None for arm in run.arms):
        sentences.append(
            "Self PPL: how likely the target finds the output, with its full cache. It says nothing of quality: it"
            f" falls when a text loops. Repeats: 4-grams that stood in the output before; from {LOOPS:.0%} on it loops,"
            " and what is fast there is fast at repeating."
        )
    return sentences + [f"Beware: {warning}." for warning in run.header.warnings]


def _intervals(run: RunFile) -> str:
    if len(run.header.outputs) == 1:
        return "Intervals tell how times of its one prompt vary, and nothing of other prompts."
    return "Intervals are 95 %."


def _disturbances(run: RunFile) -> str:
    repeated = sum(record.repeated for record in run.arms.values())
    disturbed = sum(record.disturbed for record in run.arms.values())
    if not repeated and not disturbed:
        return ""
    again = f"{repeated} timed run(s) were measured again, as other work disturbed them" if repeated else ""
    left = f"{disturbed} stayed disturbed" if disturbed else ""
    return f" {'; '.join(filter(None, (again, left)))}."


def one_line(text: str) -> str:
    return " ".join(text.split())


def duration(seconds: float) -> str:
    """Write seconds in a unit in which they are easily read."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def failing_first(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Sort verdicts as a reader wants to know them: the failing ones first."""
    order = [Verdict.REGRESSED, Verdict.MISSING, Verdict.INCONCLUSIVE, Verdict.NO_BASELINE, Verdict.WRONG_HARDWARE]
    order += [Verdict.NOT_JUDGED, Verdict.IMPROVED, Verdict.PASS]
    return sorted(judgements, key=lambda judged: order.index(judged.verdict))


def label(run: RunFile, arm: str) -> str:
    """Return the arm's name, and whether its results are synthetic."""
    return f"{arm} (synthetic)" if run.arms[arm].synthetic else arm


def outputs(run: RunFile, arm: str) -> str:
    """Say whether the arm wrote what the baseline did, or, where it is lossy, what it must."""
    record = run.arms[arm]
    if record.failure:
        return "FAILED"
    if record.bugs:
        return "WRONG"
    ties = f"{record.ties}/{record.counts().runs:.0f} ties" if record.ties else ""
    looping = "loops" if loops(run, arm) else ""
    if not record.lossy:
        return " ".join(filter(None, [ties or "equal", looping]))
    return " ".join(filter(None, ["lossy", *cells(run, arm, ["agreement"]), ties, looping]))


def loops(run: RunFile, arm: str) -> bool:
    """Return whether the arm's outputs loop, as far as it is known."""
    return (run.measures(arm).repetition or 0.0) >= LOOPS


def plain(run: RunFile, arm: str) -> str | None:
    """Return the arm that decodes plainly with the same loss as a lossy one that drafts, if there is one."""
    options = run.arms[arm].options
    if not run.arms[arm].lossy or "drafter" not in options:
        return None
    wanted = {key: options[key] for key in _LOSS if key in options}
    return next((other for other, record in run.arms.items() if record.options == wanted), None)


def drafts(record: ArmRecord) -> bool:
    """Return whether the arm proposes anything, as far as it is known: peers do not tell."""
    return len(record.histograms().depth) > 1


def proposes(record: ArmRecord) -> bool:
    """Return whether the arm proposes anything, also where the lengths of drafts are not known, as of servers."""
    return drafts(record) or (record.counts().drafted or 0) > 0


def percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else ""
