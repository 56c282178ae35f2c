"""Experiments by name: TOML files that list arms, prompts, lengths and repeats."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from specdecode.support.git import git

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TINY_TOKENS, _TINY_PROMPT = 12, 40
# By how much caches are made smaller: the least of the presets' then still holds the sinks and their deepest draft.
_TINY_CACHE = 8


@dataclass(frozen=True, slots=True)
class Preset:
    """What to measure.

    Attributes:
        arms: for each arm's name, how it decodes; `bench.arms.make` knows the keys.
        prompts: data sets and counts, as `evals.data.token_prompts` reads them.
        max_new_tokens: length of every output: benchmarks do not stop at stop tokens unless they are told to.
        repeats: blocks for each prompt.
        lengths: shorter ones, at which the same runs are looked at too.
    """

    arms: dict[str, dict[str, Any]]
    prompts: str
    max_new_tokens: int
    repeats: int
    lengths: Sequence[int] = ()

    def tiny(self) -> Preset:
        """The same arms as a rehearsal of seconds: a short prompt of each set, and lengths and caches that the smallest
        models outgrow as the preset's are outgrown."""
        shrink = max(1, self.max_new_tokens // _TINY_TOKENS)
        caches = {"cache", "draft_cache"}
        names = [part.partition(":")[0] for part in self.prompts.split(",")]
        return Preset(
            arms={
                arm: {key: value // _TINY_CACHE if key in caches else value for key, value in entry.items()}
                for arm, entry in self.arms.items()
            },
            prompts=",".join(name if "@" in name else f"{name}@{_TINY_PROMPT}" for name in names),
            max_new_tokens=self.max_new_tokens // shrink,
            repeats=1,
            lengths=[length // shrink for length in self.lengths],
        )


def preset(name: str) -> Preset:
    """A preset of the package by name, or of a TOML file by path.

    Raises:
        ValueError: no such preset, or not one by its content.
    """
    folder = Path(str(files("specdecode.bench") / "presets"))
    known = sorted(file.stem for file in folder.glob("*.toml"))
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise ValueError(f"no preset is named {name!r}: choose from {', '.join(known)}, or name a .toml file") from None
    return parse(text, name)


def parse(text: str, name: str) -> Preset:
    """A preset from its text.

    Raises:
        ValueError: it is none; the sentence says why.
    """
    try:
        return Preset(**tomllib.loads(text))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise ValueError(f"preset {name!r} cannot be read: {error}") from None


def arms_at(root: Path, ref: str, preset: str) -> list[str]:
    """The preset's arms at another commit; none if it did not have the preset."""
    path = preset if preset.endswith(".toml") else f"specdecode/bench/presets/{preset}.toml"
    try:
        return list(parse(git("show", f"{ref}:./{path}", root=root), preset).arms)
    except ValueError:
        return []
