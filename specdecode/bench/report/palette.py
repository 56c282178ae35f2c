"""The method or cache policy of an arm, with its colour everywhere, and groups of arms with like settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdecode.bench.arms.entry import drafter_kinds
from specdecode.bench.runs.names import BASELINE, PEER_BASELINE
from specdecode.bench.runs.records import ArmRecord, RunFile

COLOURS = ("#0072b2", "#d55e00", "#009070", "#b8568f", "#c98a00", "#2b9ad6", "#77700a")
"""Okabe and Ito's colours. Those too light for a white page are darkened a little. `page.css` has the same."""

PLAIN = "#59616b"
"""The colour of plain decoding."""

METHODS = {
    "linear": 0,
    "tree-static": 1,
    "tree-best-first": 2,
    "self-streaming": 3,
    "lookup": 4,
    "universal": 5,
    "head": 6,
}
"""The drafting methods, with the index of their colour in COLOURS. Other methods get an unused index."""

POLICIES = {"sink-window": 0, "key-norm": 2, "heavy-hitter": 1, "random": 4, "shuffled": 3}
"""The cache policies, with the index of their colour in COLOURS, in charts that compare policies."""

_SHAPES = {"chain": "linear", "static": "tree-static", "best-first": "tree-best-first"}
_PEERS = {
    **dict.fromkeys(("generate", "generate-compiled"), BASELINE),
    **dict.fromkeys(("assisted", "universal", "early-exit"), "linear"),
    "prompt-lookup": "lookup",
}
# Older files do not record how an arm decodes: its method is inferred from the names that all presets use.
_NAMES = {
    **{name: name for name in (BASELINE, *METHODS)},
    **{"streaming": "linear", "tree+streaming": "tree-static"},
    **{PEER_BASELINE: BASELINE, "hf-assisted": "linear", "hf-prompt-lookup": "lookup"},
}


def method(run: RunFile, arm: str) -> str:
    """Return the drafting method of an arm: one of METHODS, several joined by a plus, or "ar".

    A peer has the name of the same method here. The method of any other arm is the arm's own name. Arms of a server
    that differ only in concurrency share a name.
    """
    options = run.arms[arm].options
    if not any(record.options for record in run.arms.values()):
        start = max((name for name in _NAMES if arm.startswith(name)), key=len, default="")
        return _NAMES.get(start, arm)
    if "call" in options or "server" in options:
        return base_name(run, arm)
    if "peer" in options:
        return _PEERS.get(str(options["peer"]), arm)
    # All kinds of heads are one method: they draft from the target's hidden states.
    kinds = ["head" if kind in ("mtp", "medusa") else kind for kind in drafter_kinds(options)]
    if kinds == ["none"]:
        return BASELINE
    if kinds == ["model"]:
        return _SHAPES.get(str(options.get("shape", "chain")), arm)
    return "+".join(kinds) if len(kinds) > 1 or kinds[0] in METHODS else arm


def places(run: RunFile) -> dict[str, int | None]:
    """Return for each arm the index of its colour in COLOURS; None for plain decoding."""
    methods = {arm: method(run, arm) for arm in run.arms}
    known = {METHODS[name] for name in methods.values() if name in METHODS}
    left = [place for place in reversed(range(len(COLOURS))) if place not in known] or [len(COLOURS) - 1]
    others = sorted(set(methods.values()) - METHODS.keys() - {BASELINE})
    taken = METHODS | {name: left[i % len(left)] for i, name in enumerate(others)}
    return {arm: taken.get(name) for arm, name in methods.items()}


@dataclass(frozen=True, slots=True)
class CacheTraits:
    """The traits that decide the look of a quality suite's arm.

    Attributes:
        policy: its cache policy; None for the full cache.
        place: index of the policy's colour in COLOURS; None for the full cache.
        fade: how much lighter its colour is: 0 for the largest cache, up to 0.6 for the smallest.
        quantized: whether its weights are INT8.
        control: whether it is a negative control.
    """

    policy: str | None
    place: int | None
    fade: float
    quantized: bool
    control: bool


def cache_traits(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, CacheTraits]:
    """Return the traits of the quality suite's arms, from their preset entries.

    No arm drafts there. So arms differ only in these traits, and policies use the colours that methods have elsewhere.
    """
    sizes = sorted({entry["cache"] for entry in arms.values() if "cache" in entry}, reverse=True)
    traits = {}
    for arm, entry in arms.items():
        policy, fade = entry.get("policy"), 0.0
        if policy is not None and len(sizes) > 1 and "cache" in entry:
            fade = 0.6 * sizes.index(entry["cache"]) / (len(sizes) - 1)
        place = None if policy is None else POLICIES.get(policy, len(COLOURS) - 1)
        traits[arm] = CacheTraits(policy, place, fade, "quantize" in entry, "control" in entry)
    return traits


def concurrency(run: RunFile, arm: str) -> int:
    """Return the number of prompts that the arm's server decodes at a time; 1 for an arm without a server."""
    options = run.arms[arm].options
    number = options.get("concurrency", 1)
    return number if "server" in options and isinstance(number, int) and number > 0 else 1


def base_name(run: RunFile, arm: str) -> str:
    """Return the arm's name without its concurrency: "ar" for "ar-c4"."""
    number = concurrency(run, arm)
    return arm.removesuffix(f"-c{number}") if number > 1 else arm


def settings(record: ArmRecord, *but: str) -> str:
    """Return the preset entry of an arm without "against" and the keys `but`, as JSON with sorted keys."""
    entry = {key: value for key, value in record.options.items() if key not in ("against", *but)}
    return json.dumps(entry, sort_keys=True)


def alike(run: RunFile, arms: Sequence[str], *but: str) -> list[list[str]]:
    """Group the arms whose preset entries differ only in the keys `but`, in the run's order."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        groups.setdefault(settings(run.arms[arm], *but), []).append(arm)
    return list(groups.values())


def shared_name(run: RunFile, arms: Sequence[str], but: str) -> str:
    """Return the shared part of the names of arms that differ only in "k" or "cache"; a single arm keeps its name."""
    values = {arm: f"{'k' if but == 'k' else ''}{run.arms[arm].options.get(but)}" for arm in arms}
    names = {re.sub(rf"-?{re.escape(value)}(?![0-9])", "", arm).strip("-") for arm, value in values.items()}
    return names.pop() if len(names) == 1 < len(arms) else arms[0]
