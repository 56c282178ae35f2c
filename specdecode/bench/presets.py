"""Presets: experiments by name, as TOML files with arms, prompts, lengths and repeats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from specdecode.bench.runs.names import BASELINE
from specdecode.support.checked import parse_toml, read_text
from specdecode.support.git import git
from specdecode.support.kinds import STRING, TABLE, WHOLE, WHOLES, check_table

_FOLDER = Path(str(files("specdecode.bench") / "presets"))
_TINY_OUTPUT_TOKENS, _TINY_PROMPT_TOKENS = 12, 40
_KINDS = {
    "arms": TABLE,
    "prompts": STRING,
    "max_new_tokens": WHOLE,
    "repeats": WHOLE,
    "lengths": WHOLES,
    "baseline": STRING,
}
# Divisor of cache sizes. The smallest cache of the presets then still holds the sinks and the deepest draft.
_TINY_CACHE_DIVISOR = 8


@dataclass(frozen=True, slots=True)
class Preset:
    """An experiment: arms, prompts, lengths and repeats.

    Attributes:
        arms: entries of the arms by name, as read by `bench.arms.entry.ArmSpec`. In the file, the `concurrency` of a
            server's arm may be a list, with one arm for each number.
        prompts: data sets and counts, as read by `evals.data.token_prompts`.
        max_new_tokens: length of every output; stop tokens end it only with `--eos`.
        repeats: number of blocks for each prompt.
        lengths: shorter lengths at which the same runs are cut.
        baseline: the reference arm: the arm that others are compared with, unless they name another.
    """

    arms: dict[str, dict[str, Any]]
    prompts: str
    max_new_tokens: int
    repeats: int
    lengths: Sequence[int] = ()
    baseline: str = BASELINE

    def baseline_of(self, arm: str) -> str:
        """Return the name of the arm that an arm is compared with."""
        return str(self.arms[arm].get("baseline", self.baseline))

    def check_baselines(self) -> None:
        """Raise ValueError if a reference arm is not in the preset, or itself has another reference arm."""
        if self.baseline not in self.arms:
            raise ValueError(
                f"the preset has no arm {self.baseline!r}, with which others are compared: add it, or name another arm"
                " with baseline"
            )
        for arm in self.arms:
            baseline = self.baseline_of(arm)
            if baseline not in self.arms:
                raise ValueError(f"arm {arm!r}: its reference arm {baseline!r} is no arm of the preset")
            if self.baseline_of(baseline) != self.baseline:
                raise ValueError(
                    f"arm {arm!r}: its reference arm {baseline!r} has one of its own: compare both with the same arm"
                )

    def tiny(self) -> Preset:
        """Return the same arms in a size that takes seconds.

        Each data set gives one short prompt. Lengths and caches are much smaller.
        """
        shrink = max(1, self.max_new_tokens // _TINY_OUTPUT_TOKENS)
        caches = {"cache", "draft_cache"}
        names = [part.partition(":")[0] for part in self.prompts.split(",")]
        return Preset(
            arms={
                arm: {
                    # A value of another type is refused where the arm is made.
                    key: value // _TINY_CACHE_DIVISOR if key in caches and isinstance(value, int) else value
                    for key, value in entry.items()
                }
                for arm, entry in self.arms.items()
            },
            prompts=",".join(name if "@" in name else f"{name}@{_TINY_PROMPT_TOKENS}" for name in names),
            max_new_tokens=self.max_new_tokens // shrink,
            repeats=1,
            lengths=[max(1, length // shrink) for length in self.lengths],
            baseline=self.baseline,
        )


def built_in() -> list[str]:
    """Return the names of the package's presets."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def preset(name: str) -> Preset:
    """Read a preset: one of the package by its name, or a TOML file by its path.

    Raises:
        ValueError: the preset does not exist, or its content is not a preset.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise ValueError(f"there is no file {name} to read the preset from")
        names = ", ".join(built_in())
        raise ValueError(f"no preset is named {name!r}: choose from {names}, or name a .toml file")
    return parse(read_text(path), name)


def parse(text: str, name: str) -> Preset:
    """Read a preset from the text of its file.

    Raises:
        ValueError: the text is not a preset; the message gives the reason.
    """
    where = f"preset {name!r}"
    content = parse_toml(text, where)
    check_table(where, content, _KINDS, required=("arms", "prompts", "max_new_tokens", "repeats"))
    check_table(f"{where}, arms", content["arms"], dict.fromkeys(content["arms"], TABLE))
    read = Preset(**content)
    for key, count in (
        ("max_new_tokens", read.max_new_tokens),
        ("repeats", read.repeats),
        ("lengths", min(read.lengths, default=1)),
    ):
        if count < 1:
            raise ValueError(f"{where}: {key} is {count}: it must be at least 1")
    return replace(read, arms=_by_concurrency(read))


def _by_concurrency(read: Preset) -> dict[str, dict[str, Any]]:
    """Return the arms, with a `concurrency` list replaced by an arm for each number.

    The arm with one prompt at a time keeps its name. The others have the number in it, as in "ar-c4". Each is
    compared with its reference arm at the same number, if there is one.
    """
    lists = {
        arm: entry["concurrency"]
        for arm, entry in read.arms.items()
        if isinstance(entry, dict) and isinstance(entry.get("concurrency"), list)
    }
    arms: dict[str, dict[str, Any]] = {}
    for arm, entry in read.arms.items():
        if arm not in lists:
            arms[arm] = entry
            continue
        if not lists[arm]:
            raise ValueError(f"arm {arm!r}: concurrency is []: name at least one number of prompts")
        baseline = read.baseline_of(arm)
        for number in lists[arm]:
            at = {**entry, "concurrency": number}
            if number != 1 and baseline != arm and number in lists.get(baseline, ()):
                at["baseline"] = f"{baseline}-c{number}"
            arms[arm if number == 1 else f"{arm}-c{number}"] = at
    return arms


def arms_at(root: Path, ref: str, preset: str) -> dict[str, dict[str, Any]]:
    """Return the preset's arms at another commit; none if the commit lacks the preset.

    Args:
        root: folder of the repository, or a folder in it.
        ref: the commit.
        preset: name of a preset of the package, or path of a file.
    """
    path = f"specdecode/bench/presets/{preset}.toml"
    if preset.endswith(".toml"):
        path = Path(os.path.relpath(Path(preset).resolve(), root.resolve())).as_posix()
    try:
        return parse(git("show", f"{ref}:./{path}", root=root), preset).arms
    except ValueError:
        return {}
