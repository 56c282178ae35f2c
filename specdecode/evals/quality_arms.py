"""What the quality suite judges, by name: TOML files of texts and of ways to decode."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdecode.bench.arms.entry import ArmSpec
from specdecode.core.slots import Slots
from specdecode.evals.perplexity import DecodePath
from specdecode.models.lm import LM
from specdecode.policies.base import CachePolicy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEYS = ("policy", "cache", "quantize", "k")
_SHUFFLED = "shuffled"


@dataclass(frozen=True, slots=True)
class NeedleGrid:
    """The needles that are buried.

    Attributes:
        corpus: data set in whose documents.
        lengths: tokens of the texts.
        depths: shares of a text before the needle.
        arms: that look for them.
    """

    corpus: str
    lengths: list[int]
    depths: list[float]
    arms: list[str]


@dataclass(frozen=True, slots=True)
class TaskGrid:
    """The problems that are asked.

    Attributes:
        problems: how many of each task, by its name in `evals.tasks`.
        max_new_tokens: after which an answer is cut.
        arms: that are asked, beside the reference.
    """

    problems: dict[str, int]
    max_new_tokens: int
    arms: list[str]


@dataclass(frozen=True, slots=True)
class QualityPreset:
    """What to judge.

    Attributes:
        texts: data sets, as `evals.data.token_prompts` reads them.
        k: tokens drafted in a step, by the reference and by all arms that do not say otherwise.
        arms: for each arm's name, how it decodes; `read_arm` knows the keys.
        needle: what is buried; nothing, if it is None.
        tasks: which problems are asked; none, if it is None.
        window: tokens that are read with one cache, see `evals.perplexity.windows`; None: a whole document.
        stride: from one window to the next.
    """

    texts: str
    k: int
    arms: dict[str, dict[str, Any]]
    needle: NeedleGrid | None = None
    tasks: TaskGrid | None = None
    window: int | None = None
    stride: int | None = None


def quality_preset(name: str) -> QualityPreset:
    """A preset of the package by name, or of a TOML file by path.

    Raises:
        ValueError: no such preset, or not one by its content.
    """
    folder = Path(str(files("specdecode.evals") / "presets"))
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        needle, tasks = content.pop("needle", None), content.pop("tasks", None)
        preset = QualityPreset(
            **content,
            needle=None if needle is None else NeedleGrid(**needle),
            tasks=None if tasks is None else TaskGrid(**tasks),
        )
    except OSError:
        known = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise ValueError(
            f"no preset of the quality suite is named {name!r}: choose from {known}, or name a .toml file"
        ) from None
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise ValueError(f"preset {name!r} cannot be read: {error}") from None
    named = {entry["control"] for entry in preset.arms.values() if "control" in entry}
    for grid in (preset.needle, preset.tasks):
        named |= set(grid.arms if grid else ())
    if unknown := sorted(named - preset.arms.keys()):
        raise ValueError(f"preset {name!r} has no arm {unknown[0]!r}, which it refers to")
    return preset


class Shuffled:
    """A window whose slots are put in any order: a negative control, for a model whose keys are rotated by their
    positions.

    Args:
        window: chooses the slots that stay.
    """

    def __init__(self, window: CachePolicy) -> None:
        self._window = window
        self.interval, self.keeps, self.pinned = window.interval, window.keeps, 0
        self.reads_attention = False

    def keep(self, slots: Slots) -> Int[Tensor, " m"]:
        kept = self._window.keep(slots)
        generator = torch.Generator().manual_seed(slots.committed)
        return kept[torch.randperm(len(kept), generator=generator).to(kept.device)]


def read_arm(name: str, entry: Mapping[str, Any], k: int) -> ArmSpec:
    """Read an arm of a preset.

    Its keys are those of `ArmSpec` for `policy` (with `cache` and its settings), `quantize` and `k`. There is one more
    policy, "shuffled": a sink window in random order. `control` names the arm whose margin this one must break.

    Args:
        name: of the arm.
        entry: its keys.
        k: where the entry has none.

    Raises:
        ValueError: a key or a value that cannot be, or a package that is missing.
    """
    options = {"k": k, **entry}
    options.pop("control", None)
    if options.get("policy") == _SHUFFLED:
        options["policy"] = "sink-window"
    return ArmSpec.from_entry(name, options, _KEYS)


def make_decode_path(name: str, entry: Mapping[str, Any], target: LM, k: int, backend: str = "auto") -> DecodePath:
    """Return the way to decode of a preset's arm.

    Args:
        name: of the arm.
        entry: its keys, as `read_arm` knows them.
        target: loaded with backend="eager".
        k: where the entry has none.
        backend: how forwards run.

    Raises:
        UnsupportedModelError: the target cannot be quantised.
        ValueError: as `read_arm`.
    """
    path = decode_path(read_arm(name, entry, k), target, backend)
    return replace(path, policy=Shuffled(path.policy)) if entry.get("policy") == _SHUFFLED else path


def decode_path(spec: ArmSpec, target: LM, backend: str) -> DecodePath:
    """Return the way to decode that a spec names, to be judged: texts are known, so nothing drafts.

    Args:
        spec: with its policy, its quantisation and its draft length.
        target: loaded with backend="eager".
        backend: how forwards run.

    Raises:
        UnsupportedModelError: the target cannot be quantised.
    """
    lm = target if spec.quantize is None else target.quantized(spec.quantize)
    return DecodePath(lm.with_backend(backend), spec.cache_policy(), controller=spec.fixed_k)
