"""Presets of the quality suite, by name: TOML files with texts and decode paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from specdecode.bench.arms.entry import ArmSpec
from specdecode.evals.perplexity import DecodePath
from specdecode.evals.shuffled import Shuffled
from specdecode.models.lm import LM
from specdecode.support.checked import parse_toml, read_text
from specdecode.support.kinds import COUNTS, NAMES, NUMBERS, STRING, TABLE, WHOLE, WHOLES, check_table

_KINDS = {
    "texts": STRING,
    "k": WHOLE,
    "arms": TABLE,
    "needle": TABLE,
    "tasks": TABLE,
    "window": WHOLE,
    "stride": WHOLE,
}
_NEEDLE_KINDS = {"corpus": STRING, "lengths": WHOLES, "depths": NUMBERS, "arms": NAMES}
_TASK_KINDS = {"problems": COUNTS, "max_new_tokens": WHOLE, "arms": NAMES}
_KEYS = ("policy", "cache", "quantize", "k")
_SHUFFLED = "shuffled"


@dataclass(frozen=True, slots=True)
class NeedleGrid:
    """The needles of a preset.

    Attributes:
        corpus: data set whose documents hide the needles.
        lengths: tokens of the texts.
        depths: shares of a text before the needle.
        arms: arms that look for the needles.
    """

    corpus: str
    lengths: list[int]
    depths: list[float]
    arms: list[str]


@dataclass(frozen=True, slots=True)
class TaskGrid:
    """The task problems of a preset.

    Attributes:
        problems: number of problems by task name in `evals.tasks`.
        max_new_tokens: tokens after which an answer is cut.
        arms: arms that answer, beside the reference.
    """

    problems: dict[str, int]
    max_new_tokens: int
    arms: list[str]


@dataclass(frozen=True, slots=True)
class QualityPreset:
    """The texts, arms and trials of a quality run.

    Attributes:
        texts: data sets, in the notation of `evals.data.token_prompts`.
        k: tokens drafted in a step, by the reference and by all arms without a `k` of their own.
        arms: settings of each arm, by name, with the keys of `read_arm`.
        needle: needles to look for; None for none.
        tasks: problems to solve; None for none.
        window: tokens that are read with one cache, see `evals.perplexity.windows`; None for a whole document.
        stride: tokens from one window to the next.
    """

    texts: str
    k: int
    arms: dict[str, dict[str, Any]]
    needle: NeedleGrid | None = None
    tasks: TaskGrid | None = None
    window: int | None = None
    stride: int | None = None


def quality_preset(name: str) -> QualityPreset:
    """Return a preset: one of the package by its name, or one of a TOML file by its path.

    Raises:
        ValueError: there is no such preset, or its content is not valid.
    """
    folder = Path(str(files("specdecode.evals") / "presets"))
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise ValueError(f"no preset of the quality suite is named {name!r}: choose from {known}, or name a .toml file")
    where = f"preset {name!r}"
    content = parse_toml(read_text(path), where)
    check_table(where, content, _KINDS, required=("texts", "k", "arms"))
    check_table(f"{where}, arms", content["arms"], dict.fromkeys(content["arms"], TABLE))
    needle, tasks = content.pop("needle", None), content.pop("tasks", None)
    for key, grid, kinds in (("needle", needle, _NEEDLE_KINDS), ("tasks", tasks, _TASK_KINDS)):
        if grid is not None:
            check_table(f"{where}, {key}", grid, kinds, required=kinds)
    if tasks is not None and tasks["max_new_tokens"] < 1:
        raise ValueError(f"{where}, tasks: max_new_tokens is {tasks['max_new_tokens']}: give 1 or more")
    preset = QualityPreset(
        **content,
        needle=None if needle is None else NeedleGrid(**needle),
        tasks=None if tasks is None else TaskGrid(**tasks),
    )
    controls = {arm: entry["control"] for arm, entry in preset.arms.items() if "control" in entry}
    check_table(f"{where}, control", controls, dict.fromkeys(controls, STRING))
    named = set(controls.values())
    for grid in (preset.needle, preset.tasks):
        named |= set(grid.arms if grid else ())
    if unknown := sorted(named - preset.arms.keys()):
        raise ValueError(f"preset {name!r} has no arm {unknown[0]!r}, which it refers to")
    return preset


def read_arm(name: str, entry: Mapping[str, Any], k: int) -> ArmSpec:
    """Read an arm of a preset.

    Its keys are those of `ArmSpec` for `policy` (with `cache` and the policy's settings), `quantize` and `k`. One
    further policy is "shuffled": a sink window in random order. `control` names the arm whose margin this arm must
    exceed.

    Args:
        name: name of the arm.
        entry: keys and values of the arm.
        k: draft length if the entry has none.

    Raises:
        ValueError: an impossible key or value.
    """
    options = {"k": k, **entry}
    options.pop("control", None)
    if options.get("policy") == _SHUFFLED:
        options["policy"] = "sink-window"
    return ArmSpec.from_entry(name, options, _KEYS)


def make_decode_path(name: str, entry: Mapping[str, Any], target: LM, k: int, backend: str = "auto") -> DecodePath:
    """Return the decode path of a preset's arm.

    Args:
        name: name of the arm.
        entry: keys and values of the arm, see `read_arm`.
        target: the target, loaded with backend="eager".
        k: draft length if the entry has none.
        backend: backend of the forwards.

    Raises:
        UnsupportedModelError: the target cannot be quantised.
        ValueError: as `read_arm`.
    """
    path = decode_path(read_arm(name, entry, k), target, backend)
    return replace(path, policy=Shuffled(path.policy)) if entry.get("policy") == _SHUFFLED else path


def decode_path(spec: ArmSpec, target: LM, backend: str) -> DecodePath:
    """Return the decode path of a spec, for known texts: the spec's drafter is not used.

    Args:
        spec: settings, of which policy, quantisation and draft length are used.
        target: the target, loaded with backend="eager".
        backend: backend of the forwards.

    Raises:
        UnsupportedModelError: the target cannot be quantised.
    """
    lm = target if spec.quantize is None else target.quantized(spec.quantize)
    return DecodePath(lm.with_backend(backend), spec.cache_policy(), controller=spec.fixed_k)
