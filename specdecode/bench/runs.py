"""Run files: pytest-benchmark's own JSON with what a gate needs in it, written by the suite and read with suspicion."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdecode.bench.names import BASELINE, PEER_BASELINE, slug

if TYPE_CHECKING:
    from specdecode.bench.measure import Results

FORMAT = 1
_KEY = "specdecode"

TOLERANCE = 0.05
"""By how much an arm may become slower, as a share, before the gate closes."""

COUNTERS = {
    "target_forwards_per_token": -1,
    "draft_forwards_per_token": -1,
    "mean_acceptance_length": +1,
    "acceptance_rate": +1,
    "cache_bytes": -1,
}
"""Measures that do not depend on the clock, and whether more of one is better (+1) or worse (-1)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What runs must share to be compared.

    Attributes:
        hardware: the GPU's name, or the processor's model and threads: times mean something only on the same.
        target, draft: names of models, as they were given.
        dtype: of the weights.
        preset: its name.
    """

    hardware: str
    target: str
    draft: str
    dtype: str
    preset: str

    @property
    def file(self) -> Path:
        """Where the baseline of such a run is kept, below the folder of baselines."""
        pair = f"{slug(self.target)}+{slug(self.draft)}" if self.draft else slug(self.target)
        return Path(self.hardware) / f"{pair}-{self.dtype}-{self.preset}.json"


@dataclass(frozen=True, slots=True)
class Header:
    """What was measured, and where.

    Attributes:
        identity: what runs must share.
        max_new_tokens: length of every output.
        prompts: ids, in order.
        floor: the A/A floor, in logarithms.
        versions: of Python, torch, transformers and so on, for information; and the source of the target's weights.
    """

    identity: Identity
    max_new_tokens: int
    prompts: list[str]
    floor: float
    versions: dict[str, str | int]

    def as_json(self) -> dict[str, Any]:
        """The header as it stands in the file."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """One arm's results.

    Attributes:
        log_speedups: for each prompt, over the yardstick of the same block (see `yardstick`), averaged over repeats.
        counters: those of COUNTERS that the arm has.
        bugs: outputs that were wrong.
    """

    log_speedups: dict[str, float]
    counters: dict[str, float]
    bugs: int


@dataclass(frozen=True, slots=True)
class RunFile:
    """One run: its header, and its arms by name."""

    path: Path
    header: Header
    arms: dict[str, ArmRecord]


def yardstick(arm: str) -> str:
    """What an arm's time is compared with in its own block: `ar`; and `ar` itself with transformers, which our code
    cannot slow down."""
    return PEER_BASELINE if arm == BASELINE else BASELINE


def extra_info(results: Results, arm: str) -> dict[str, Any]:
    """What pytest-benchmark keeps of an arm: all measures as plain numbers, and the log speedups by prompt."""
    over = yardstick(arm)
    logs = results.log_speedups(arm, over) if over in results.runs else {}
    measures = {name: value for name, value in results.measures(arm).items() if math.isfinite(value)}
    return {**measures, "log_speedups": {prompt: sum(of) / len(of) for prompt, of in logs.items()}}


def run_file(header: Header, results: Results) -> RunFile:
    """A run of this session, as it would be read from its file."""
    arms = {arm: _arm(extra_info(results, arm), header) for arm in results.runs}
    return RunFile(Path(), header, arms)


def read(path: Path) -> RunFile:
    """A run file, checked entry by entry: it may be cut off, of another version, or somebody else's.

    Raises:
        ValueError: it is not a run file that this version can judge; the sentence says why.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not whole: it is no JSON; measure again") from None
    try:
        head = content[_KEY]
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {head['format']!r}, and this version reads {FORMAT}")
        header = Header(
            Identity(**{field.name: _text(head["identity"], field.name) for field in fields(Identity)}),
            max_new_tokens=int(_number(head, "max_new_tokens")),
            prompts=[str(prompt) for prompt in head["prompts"]],
            floor=_number(head, "floor"),
            versions=dict(head["versions"]),
        )
        arms = {test["param"]: _arm(test["extra_info"], header) for test in content["benchmarks"] if test.get("param")}
    except KeyError as error:
        raise ValueError(f"{path} is no run of `pytest --benchmark`: it has no {error}") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} cannot be judged: {error}") from None
    if not arms:
        raise ValueError(f"{path} cannot be judged: it holds no arms")
    return RunFile(path, header, arms)


def _arm(extra: Any, header: Header) -> ArmRecord:
    logs = {str(prompt): _number(extra["log_speedups"], prompt) for prompt in extra["log_speedups"]}
    if unknown := logs.keys() - set(header.prompts):
        raise ValueError(f"it has times of a prompt that it does not list, {min(unknown)!r}")
    return ArmRecord(
        log_speedups=logs,
        counters={name: _number(extra, name) for name in COUNTERS if name in extra},
        bugs=int(_number(extra, "bugs")),
    )


def _number(values: Any, name: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, which is no number")
    return float(value)


def _text(values: Any, name: str) -> str:
    value = values[name]
    # These name files: nothing in them may lead elsewhere.
    if not isinstance(value, str) or (name in ("hardware", "dtype", "preset") and value != slug(value)):
        raise ValueError(f"{name} is {value!r}, which is no name")
    return value


def bless(path: Path, baselines: Path, reason: str) -> Path:
    """Write a run to the baselines, with the reason in it.

    Returns:
        The baseline's file.

    Raises:
        ValueError: no reason, or the run is none to expect anything by: changes that are not committed, a wrong
            output, or a machine so unsteady that two runs of the same code differ by more than the gate's tolerance.
    """
    run = read(path)
    if not reason.strip():
        raise ValueError("the reason is empty: say why this run is what is to be expected")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("commit_info", {}).get("dirty") is not False:
        raise ValueError(f"{path} was measured with changes that are not committed: commit them, and measure again")
    if wrong := [name for name, arm in run.arms.items() if arm.bugs]:
        raise ValueError(f"{path} has wrong outputs ({', '.join(wrong)}): it is no baseline")
    if run.header.floor > math.log1p(TOLERANCE):
        raise ValueError(
            f"{path} was measured where two runs of the same code differ by {math.expm1(run.header.floor):.0%}: quiet"
            f" the machine or measure more prompts, until it is {TOLERANCE:.0%} at most"
        )
    content[_KEY]["reason"] = reason.strip()
    for private in ("node", "release"):  # a machine's name says nothing about its speed
        content.get("machine_info", {}).pop(private, None)
    file = baselines / run.header.identity.file
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)
    return file
