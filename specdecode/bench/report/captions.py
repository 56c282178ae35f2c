"""The text of tables: names of runs and arms, values as text, and notes."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from specdecode.bench.arms.keys import loss_settings
from specdecode.bench.gate.series import turns
from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.presets import built_in
from specdecode.bench.report.grid import Column
from specdecode.bench.runs.measures import Measures
from specdecode.bench.runs.names import ANY_HARDWARE, BASELINE, FLAGS, OWN_TYPE, PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, Identity, RunFile

LOOPS = 0.5
"""An output loops if at least this share of its 4-grams occurred in it before."""

# The peers that decode without a draft.
_PLAIN_PEERS = ("generate", "generate-compiled")


def title(run: RunFile) -> str:
    """Return the models and the settings of the experiment, as a title."""
    identity = run.header.identity
    size = f"{len(run.header.outputs)} prompts x {run.header.max_new_tokens} tokens"
    return f"{models(run)}, {type_of(identity)} on {identity.hardware}, preset {identity.preset}, {size}"


def type_of(identity: Identity) -> str:
    """Return the data type of the weights."""
    return "the data type of its servers" if identity.dtype == OWN_TYPE else identity.dtype


def models(run: RunFile) -> str:
    """Return the name of the target, and of the draft if there is one."""
    identity = run.header.identity
    return f"{identity.target} with {identity.draft}" if identity.draft else identity.target


def judged_by(run: RunFile, old: RunFile | None, expected: Path) -> str:
    """Return a sentence about the baseline of the verdicts.

    Args:
        run: the judged run.
        old: its baseline; None if there is none.
        expected: path of a baseline for this hardware.
    """
    if old is None:
        return f"No baseline for this hardware: {expected} does not exist, so nothing was judged."
    text = f"Judged by {old.path}"
    text += f", of {old.date}: {old.reason}." if old.reason else "."
    ours, theirs = run.header, old.header
    if theirs.identity.hardware == ANY_HARDWARE:
        text += " It was blessed for its counters alone."
    elif theirs.identity.hardware != ours.identity.hardware:
        text += " It was measured on another machine: counters are judged, times are not."
    different = [
        f"{name} {theirs.versions[name]} -> {value}"
        for name, value in ours.versions.items()
        if theirs.versions.get(name, value) != value
    ]
    return text + (f" Changed since then: {', '.join(different)}." if different else "")


def command(run: RunFile) -> str:
    """Return the command that repeats the measurement, as far as the file records it."""
    identity, header = run.header.identity, run.header
    sets = Counter(prompt.rpartition("/")[0] for prompt in header.outputs)
    repeats = max((row.counts.runs for record in run.arms.values() for row in record.rows.values()), default=1)
    flags = [flag for flag in FLAGS if flag in identity.preset.split(".")[1:]]
    preset = identity.preset.removesuffix("".join(f".{flag}" for flag in flags))
    options = {
        "preset": preset if preset in built_in() else f"{preset}.toml",
        "target": identity.target,
        "draft": identity.draft,
        "device": "" if header.devices > 1 else "cuda" if header.on_gpu else "cpu",
        "dtype": "" if identity.dtype == OWN_TYPE else identity.dtype,
        "tp": "auto" if header.processes > 1 else "",
        "device-map": "auto" if header.devices > 1 else "",
        "draft-device": header.draft_device,
        "prompts": ",".join(f"{name}:{count}" for name, count in sets.items()),
        "max-new-tokens": str(header.max_new_tokens),
        "backend": "" if max(header.processes, header.devices) > 1 else str(header.versions.get("backend", "")),
        "repeats": "" if header.until else f"{repeats:.0f}",
        "until": f"{header.until:g}" if header.until else "",
    }
    arguments = [f"--{option}={value}" for option, value in options.items() if value]
    processes = ["torchrun", f"--nproc-per-node={header.processes}", "-m"] if header.processes > 1 else []
    return shlex.join([*processes, "pytest", "--benchmark", *arguments, *(f"--{flag}" for flag in flags)])


Cell = Callable[[RunFile, str], str]
"""A function that returns the text of a cell for an arm of a run; empty if the value is unknown."""


def _measure(value: Callable[[Measures], float | None], write: Callable[[float], str]) -> Cell:
    def cell(run: RunFile, arm: str) -> str:
        known = value(run.measures(arm))
        return "" if known is None else write(known)

    return cell


def _throughput(run: RunFile, arm: str) -> str:
    """Return the tokens per second, with the standard deviation between prompts if there are several."""
    measures = run.measures(arm)
    return " ± ".join(f"{value:.1f}" for value in (measures.throughput, measures.throughput_std) if value is not None)


def _speedup(over: str) -> Cell:
    return lambda run, arm: f"{run.speedup(arm, over)}" if run.log_speedups(arm, over) else ""


def _own_speedup(run: RunFile, arm: str) -> str:
    """Return the speedup over the arm's reference arm, with its name if it is not the run's."""
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
"""The functions of table columns, by name."""


COLUMNS: dict[str, Column] = {
    "throughput": Column("tokens/s", about="of all prompts together, ± the standard deviation between prompts"),
    "speedup": Column("speedup over {baseline}", about="ratio of speeds, measured side by side, and its interval"),
    "over_hf": Column(f"over {PEER_BASELINE}", about="the same over transformers' plain decoding"),
    "predicted_speedup": Column(
        "predicted", breaks=True, about="speedup from acceptance and the times of forwards, without overhead"
    ),
    "ttft_s": Column("TTFT ms", breaks=True, about="time to the first token, the median"),
    "ttft_p95_s": Column("TTFT p95 ms", breaks=True, about="its 95th percentile over single requests"),
    "tpot_s": Column("TPOT ms", breaks=True, about="time per token after the first, the median"),
    "tpot_p95_s": Column("TPOT p95 ms", breaks=True, about="its 95th percentile over single requests"),
    "mean_acceptance_length": Column("τ", breaks=True, about="tokens of output per step, the mean"),
    "acceptance_rate": Column("accepted", breaks=True, about="share of the proposals that the target accepted"),
    "roofline_share": Column(
        "roofline",
        breaks=True,
        about="share of the speed at which memory can stream the weights, and the keys and values of a prompt of mean"
        " length",
    ),
    "weight_bytes": Column("weights MB", about="the target's, as stored"),
    "peak_cache_bytes": Column("KV MB", about="peak size of keys and values"),
    "grown_bytes": Column("growth MB", about="the peak KV minus the KV after the first step"),
    "compressions": Column("evictions", about="per run"),
    "peak_bytes": Column("peak MB", about="the most memory in use at once in a short run, above all loaded weights"),
    "self_ppl": Column(
        "self PPL",
        breaks=True,
        about="perplexity of the output under the target with its full cache; no measure of quality, as it falls when a"
        " text loops",
    ),
    "repetition": Column("repeats", breaks=True, about="share of 4-grams that occurred in the output before"),
}
"""The columns of measures: headings and explanations."""


def cells(run: RunFile, arm: str, measures: Sequence[str]) -> list[str]:
    """Return the texts of some measures of `CELLS` for an arm."""
    return [CELLS[measure](run, arm) for measure in measures]


def columns(run: RunFile, measures: Sequence[str]) -> list[Column]:
    """Return the columns of some measures of `COLUMNS`."""
    chosen = [COLUMNS[measure] for measure in measures]
    return [column._replace(name=column.name.format(baseline=run.header.baseline)) for column in chosen]


def notes(run: RunFile) -> list[str]:
    """Return the notes on a table of speeds."""
    baseline = run.header.baseline
    options = run.arms[baseline].options if baseline in run.arms else {}
    plainly = ", autoregressive decoding by this package" if baseline == BASELINE else ""
    if {"server", "call"} & options.keys():
        plainly = ", which a server decodes" if "server" in options else ", which code outside of this package decodes"
    floors = f"two runs of {baseline}", f"two versions with the same {baseline}"
    sentences = [
        f"Reference arm: {baseline}{plainly}. {_intervals(run)}",
        f"A/A floor: {floors[turns(run) == 'versions']} differ by up to {math.expm1(run.header.floor):.1%} on"
        f" average.{_disturbances(run)}",
    ]
    if run.header.roofline:
        sentences.append(f"The roofline is {run.header.roofline:.0f} tokens/s.")
    peers = {arm: record.against for arm, record in run.arms.items() if record.against}
    if ratios := _ratios(run, peers):
        sentences.append(f"Against transformers, same draft and settings: {ratios}.")
    if stronger := _strongest_plain(run):
        sentences.append(stronger)
    replayed = {arm: record.ties for arm, record in run.arms.items() if "replay" in record.options and record.ties}
    if replayed:
        left = ", ".join(f"{arm} ({ties})" for arm, ties in replayed.items())
        sentences.append(
            f"Outputs that left the replayed text at a tie: {left}. After a tie, fewer proposals may be accepted than"
            " the replay sets."
        )
    if lost := _lost_drafts(run):
        sentences.append(
            f"Drafts that found no place in the replayed text: {lost}. Fewer proposals were accepted there than the"
            " replay sets."
        )
    if captured := ", ".join(f"{arm} ({record.captured})" for arm, record in run.arms.items() if record.captured):
        sentences.append(
            f"Timed runs that captured CUDA graphs or compiled, even when repeated: {captured}. Their times may be too"
            " long."
        )
    bases = {arm: base for arm in run.arms if (base := plain(run, arm)) is not None}
    if ratios := _ratios(run, bases):
        sentences.append(f"Against plain decoding with the same loss: {ratios}.")
    return sentences + [f"Beware: {warning}." for warning in run.header.warnings]


def _lost_drafts(run: RunFile) -> str:
    """Return how many drafts of each replayed arm found no place in the replayed text; "" if all did."""
    lost = {arm: record.counts().lost for arm, record in run.arms.items()}
    return ", ".join(
        f"{arm} ({count:.0f} of {sum(run.arms[arm].histograms().depth[1:])})" for arm, count in lost.items() if count
    )


def _ratios(run: RunFile, others: Mapping[str, str]) -> str:
    """Return the speed of each arm over another one's, by the arm's name; without arms whose times are void."""
    known = {arm: other for arm, other in others.items() if run.log_speedups(arm, over=other)}
    return "; ".join(
        f"{arm} over {other} {run.speedup(arm, over=other)}"
        for arm, other in known.items()
        if not (run.arms[arm].faulty or run.arms[other].faulty)
    )


def _strongest_plain(run: RunFile) -> str:
    """Compare the fastest exact arm with the strongest of several ways to decode plainly; "" if there are not several.

    A speedup over the weaker one alone would say too much.
    """
    right = [arm for arm, record in run.arms.items() if not record.faulty]
    speeds = {arm: run.speedup(arm, over=run.header.baseline).value for arm in right}
    speeds = {arm: speed for arm, speed in speeds.items() if math.isfinite(speed)}
    peers = [arm for arm in speeds if run.arms[arm].options.get("peer") in _PLAIN_PEERS]
    ours = [arm for arm in speeds if not (run.arms[arm].peer or run.arms[arm].lossy)]
    if len(peers) < 2 or not ours:
        return ""
    strongest = max([run.header.baseline, *peers], key=lambda arm: speeds.get(arm, 1.0))
    fastest = max(ours, key=lambda arm: speeds[arm])
    if fastest == strongest:
        return f"No other arm of this package is faster than {strongest}."
    ratio = run.speedup(fastest, over=strongest)
    return f"The strongest plain decoding here is {strongest}; the fastest arm, {fastest}, has {ratio} times its speed."


def _intervals(run: RunFile) -> str:
    if len(run.header.outputs) == 1:
        return "Intervals show how the times of the one prompt vary, and say nothing about other prompts."
    return "Intervals are 95 %."


def _disturbances(run: RunFile) -> str:
    names = ("repeated", "disturbed", "slices", "left_out")
    repeated, disturbed, slices, left_out = (sum(getattr(arm, name) for arm in run.arms.values()) for name in names)
    why = "because other work disturbed them"
    again = f"{repeated} timed run(s) were measured again, {why}" if repeated else ""
    left = f"{disturbed} stayed disturbed" if disturbed else ""
    parts = f"{left_out} of {slices} slices of a few steps are not compared, {why}" if left_out else ""
    return "".join(f" {text}." for text in ("; ".join(filter(None, (again, left))), parts) if text)


def one_line(text: str) -> str:
    return " ".join(text.split())


def duration(seconds: float) -> str:
    """Return seconds as text, in a unit that is easy to read."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def verdict_columns(what: str = "arm") -> list[Column]:
    """Return the columns of a table of verdicts. `what` heads the column of names."""
    why = "new over old with its interval, the tolerance, and what the run would detect; for counters, old -> new"
    return [
        # It names no verdict: who searches a log for one that fails would find it in every run.
        Column("verdict", False, about="the setting of the gate says which ones fail"),
        Column(what, False),
        Column("of", False, about="a time, or counters, which do not depend on the clock"),
        Column("why", False, True, why),
    ]


BLESSED = "why the run was blessed"
"""The explanation of the column of a baseline's reason."""


def failing_first(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Sort verdicts by their importance to a reader: the failing ones first."""
    return sorted(judgements, key=lambda judged: [*Verdict].index(judged.verdict))


def label(run: RunFile, arm: str) -> str:
    """Return the arm's name, with a mark if its results are synthetic."""
    return f"{arm} (synthetic)" if run.arms[arm].synthetic else arm


def marked(run: RunFile, arm: str) -> str:
    """Return the label, with WRONG or FAILED if its times are void: for tables without a column of `outputs`."""
    return f"{label(run, arm)}, {outputs(run, arm)}" if run.arms[arm].faulty else label(run, arm)


def outputs(run: RunFile, arm: str) -> str:
    """Return the result of the check of the arm's outputs."""
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


_OUTPUTS = {
    "equal": "to the reference arm's",
    "ties": "outputs that differ from it, first where rounding decides between two tokens",
    "lossy": "checked against plain decoding with the same cache and the same weights, but not if outside code declares"
    " itself lossy; the share is of the tokens before the output first differs from the reference arm's",
    "loops": f"from {LOOPS:.0%} of repeats on, where speed is the speed of repeating",
    "WRONG": "other tokens, so its times are void",
    "FAILED": "did not decode",
}


def output_column(run: RunFile, arms: Iterable[str]) -> Column:
    """Return the column of `outputs` of some arms. Its explanation has the words that occur in its cells."""
    words = {word for arm in arms for word in outputs(run, arm).split()}
    meanings = ", ".join(f"{word} ({meaning})" for word, meaning in _OUTPUTS.items() if word in words)
    return Column("output", figures=False, about=meanings)


def loops(run: RunFile, arm: str) -> bool:
    """Return whether the arm's outputs are known to loop."""
    return (run.measures(arm).repetition or 0.0) >= LOOPS


def plain(run: RunFile, arm: str) -> str | None:
    """Return the plain-decoding arm with the same loss as a lossy drafting arm; None if there is none."""
    options = run.arms[arm].options
    if not run.arms[arm].lossy or "drafter" not in options:
        return None
    wanted = loss_settings(options) | ({"backend": options["backend"]} if "backend" in options else {})
    return next((other for other, record in run.arms.items() if record.options == wanted), None)


def drafts(record: ArmRecord) -> bool:
    """Return whether the arm is known to have drafted. Peers do not report it."""
    return len(record.histograms().depth) > 1


def proposes(record: ArmRecord) -> bool:
    """Return whether the arm drafted, even if the lengths of drafts are unknown, as with servers."""
    return drafts(record) or (record.counts().drafted or 0) > 0


def percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else ""
