"""What tables say of a run: names, values as text, and notes."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from specdecode.bench.gate.verdicts import Judgement, Verdict
from specdecode.bench.runs.names import FLAGS, PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile
from specdecode.support.files import slug

FORMATS: dict[str, Callable[[float], str]] = {
    "throughput": "{:.1f}".format,
    "throughput_std": "{:.1f}".format,
    "predicted_speedup": "{:.2f}".format,
    "ttft_s": lambda seconds: f"{1e3 * seconds:.0f}",
    "tpot_s": lambda seconds: f"{1e3 * seconds:.1f}",
    "mean_acceptance_length": "{:.2f}".format,
    "acceptance_rate": "{:.0%}".format,
    "roofline_share": "{:.0%}".format,
    "weight_bytes": lambda held: f"{held / 1e6:.1f}",
    "peak_cache_bytes": lambda held: f"{held / 1e6:.1f}",
    "peak_bytes": lambda held: f"{held / 1e6:.1f}",
    "grown_bytes": lambda held: f"{held / 1e6:.1f}",
    "compressions": "{:.1f}".format,
    "agreement": "{:.0%}".format,
    "self_ppl": "{:.2f}".format,
    "repetition": "{:.0%}".format,
}
"""How tables write the measures."""

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
    "The speedup over ar of all tokens together as a product: how many fewer steps the acceptance length asks for, and"
    " what drafting, verifying a draft and overhead leave of that. A factor of 0.80 costs a fifth of the speed."
)
"""What a table of limits does not say by itself."""


# What an entry of a preset says of the target that is decoded, and not of how drafts are made.
_LOSS = ("policy", "cache", "quantize", "backend")


def title(run: RunFile) -> str:
    """The models, and what the experiment is."""
    of = run.header.identity
    size = f"{len(run.header.outputs)} prompts x {run.header.max_new_tokens} tokens"
    return f"{models(run)}, {of.dtype} on {of.hardware}, preset {of.preset}, {size}"


def models(run: RunFile) -> str:
    """The target, and the draft if there is one."""
    of = run.header.identity
    return f"{of.target} with {of.draft}" if of.draft else of.target


def judged_by(run: RunFile, old: RunFile | None, expected: Path) -> str:
    """What the verdicts compare with, in words.

    Args:
        run: that is judged.
        old: its baseline.
        expected: where there would be one.
    """
    if old is None:
        return f"No baseline for this hardware: {expected} is not there, so nothing was judged."
    told = f"Judged by {old.path}"
    told += f", of {old.date}: {old.reason}." if old.reason else "."
    ours, theirs = run.header, old.header
    if theirs.identity.hardware != ours.identity.hardware:
        told += " It is another machine's: counters are judged, times are not."
    different = [
        f"{name} {theirs.versions[name]} -> {value}"
        for name, value in ours.versions.items()
        if theirs.versions.get(name, value) != value
    ]
    return told + (f" What is not as it was: {', '.join(different)}." if different else "")


def command(run: RunFile) -> str:
    """The command that measures the same again, as far as the file tells."""
    of, header = run.header.identity, run.header
    sets = Counter(prompt.rpartition("/")[0] for prompt in header.outputs)
    repeats = max((row.counts["runs"] for record in run.arms.values() for row in record.rows.values()), default=1)
    flags = [flag for flag in FLAGS if flag in of.preset.split(".")[1:]]
    options = {
        "preset": of.preset.removesuffix("".join(f".{flag}" for flag in flags)),
        "target": of.target,
        "draft": of.draft,
        "device": "cuda" if slug(str(header.versions.get("gpu", ""))) == of.hardware else "cpu",
        "dtype": of.dtype,
        "prompts": ",".join(f"{name}:{count}" for name, count in sets.items()),
        "max-new-tokens": str(header.max_new_tokens),
        "repeats": f"{repeats:.0f}",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value]
    return shlex.join(["pytest", "--benchmark", *given, *(f"--{flag}" for flag in flags)])


def cells(run: RunFile, arm: str, columns: Sequence[str]) -> list[str]:
    """Measures of an arm as text; empty where it has none."""
    measures = run.measures(arm)
    texts = {name: FORMATS[name](value) for name, value in measures.items() if name in FORMATS}
    if "throughput_std" in texts:
        texts["throughput"] += f" ± {texts['throughput_std']}"
    if "speedup" in measures:
        texts["speedup"] = f"{run.speedup(arm)}"
    if run.log_speedups(arm, over=PEER_BASELINE):
        texts["over_hf"] = f"{run.speedup(arm, over=PEER_BASELINE)}"
    return [texts.get(column, "") for column in columns]


def notes(run: RunFile) -> list[str]:
    """What a table of speeds does not say by itself."""
    said = [
        "Baseline ar: autoregressive decoding by this package. Intervals are 95 %.",
        f"A/A floor: two runs of ar differ by up to {math.expm1(run.header.floor):.1%} in the mean.",
        "Predicted: from acceptance and forwards, without overhead. Roofline: share of the speed at which memory can"
        f" stream the weights, {run.header.roofline:.0f} tokens/s.",
    ]
    peers = {arm: record.against for arm, record in run.arms.items() if record.against}
    if compared := {arm: peer for arm, peer in peers.items() if run.log_speedups(arm, over=peer)}:
        told = "; ".join(f"{arm} over {peer} {run.speedup(arm, over=peer)}" for arm, peer in compared.items())
        said.append(f"Against transformers, same draft and settings: {told}.")
    if any(record.lossy for record in run.arms.values()):
        said.append(
            "Lossy: checked against plain decoding with the same cache and the same weights. The share is that of its"
            " tokens that come before it leaves ar's output."
        )
    own = {arm: base for arm in run.arms if (base := plain(run, arm)) is not None}
    if own := {arm: base for arm, base in own.items() if run.log_speedups(arm, over=base)}:
        told = "; ".join(f"{arm} over {base} {run.speedup(arm, over=base)}" for arm, base in own.items())
        said.append(f"Against plain decoding with the same loss: {told}.")
    if any("repetition" in run.measures(arm) for arm in run.arms):
        said.append(
            "Self PPL: how likely the target finds the output, with its full cache. It says nothing of quality: it"
            f" falls when a text loops. Repeats: 4-grams that stood in the output before; from {LOOPS:.0%} on it loops,"
            " and what is fast there is fast at repeating."
        )
    return said + [f"Beware: {warning}." for warning in run.header.warnings]


def one_line(text: str) -> str:
    return " ".join(text.split())


def failing_first(judgements: Sequence[Judgement]) -> list[Judgement]:
    """In the order in which a reader wants to know them."""
    order = [Verdict.REGRESSED, Verdict.MISSING, Verdict.INCONCLUSIVE, Verdict.NO_BASELINE, Verdict.WRONG_HARDWARE]
    order += [Verdict.NOT_JUDGED, Verdict.IMPROVED, Verdict.PASS]
    return sorted(judgements, key=lambda judged: order.index(judged.verdict))


def label(run: RunFile, arm: str) -> str:
    """The arm's name, and whether its results are synthetic."""
    return f"{arm} (synthetic)" if run.arms[arm].synthetic else arm


def outputs(run: RunFile, arm: str) -> str:
    """Whether the arm wrote what the baseline did, or, where it is lossy, what it must."""
    record = run.arms[arm]
    if record.bugs:
        return "WRONG"
    ties = f"{record.ties}/{record.total('runs'):.0f} ties" if record.ties else ""
    loops = "loops" if run.measures(arm).get("repetition", 0.0) >= LOOPS else ""
    if not record.lossy:
        return " ".join(filter(None, [ties or "equal", loops]))
    return " ".join(filter(None, ["lossy", *cells(run, arm, ["agreement"]), ties, loops]))


def plain(run: RunFile, arm: str) -> str | None:
    """The arm that decodes plainly with the same loss as a lossy one that drafts, if there is one."""
    options = run.arms[arm].options
    if not run.arms[arm].lossy or "drafter" not in options:
        return None
    wanted = {key: options[key] for key in _LOSS if key in options}
    return next((other for other, record in run.arms.items() if record.options == wanted), None)


def drafts(record: ArmRecord) -> bool:
    """Whether the arm proposes anything, as far as it is known: peers do not tell."""
    return len(record.histogram("depth")) > 1


def percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else ""
