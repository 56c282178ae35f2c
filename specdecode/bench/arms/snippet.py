"""From an arm to the lines of Python that decode as it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdecode.bench.runs.names import drafters
from specdecode.bench.runs.records import RunFile
from specdecode.support.files import slug


def code(run: RunFile, arm: str) -> str:
    """Lines of Python that decode as the arm did. All that comes from the file stands in them as a literal."""
    of, options = run.header.identity, run.arms[arm].options
    on_gpu = slug(str(run.header.versions.get("gpu", ""))) == of.hardware
    how = {
        "device": "cuda" if on_gpu else "cpu",
        "dtype": of.dtype,
        "backend": options.get("backend", run.header.versions.get("backend", "auto")),
    }
    kinds, quantize = drafters(options), _some(options, quantize="quantize")
    lines = ["import specdecode", ""]
    if "policy" in options:
        lines.insert(1, "from specdecode.policies import policy")
    lines.append(f"target = {_call('specdecode.load', repr(of.target), **how, **quantize)}")
    if {"model", "universal"} & {*kinds}:
        target = "target"
        if quantize and of.draft.startswith("layers:"):
            # What is drafted with is not quantised.
            target = "plain"
            lines.append(f"plain = {_call('specdecode.load', repr(of.target), **how)}")
        by_text = {"same_vocabulary": False} if "universal" in kinds else {}
        draft = _call("specdecode.load", repr(of.draft), f"target={target}", **how, **by_text)
        lines.append(f"draft = {draft}")
    if "head" in kinds:
        lines.append(f"head = {_call('specdecode.load_head', repr(options.get('head', of.target)), 'target')}")
    made = [_drafter(kind, options) for kind in kinds]
    lines.append(f"drafter = {made[0] if len(made) == 1 else _call('specdecode.Cascade', *made)}")
    given = ["target", "target.encode('Once upon a time')", "drafter=drafter"]
    if kinds != ["none"]:
        given.append(f"controller={_controller(options)}")
    if "policy" in options:
        given.append(f"policy=policy({options['policy']!r}, {options.get('cache', 256)!r})")
    given += [f"max_new_tokens={run.header.max_new_tokens}", "stop_token_ids=target.stop_token_ids"]
    return "\n".join([*lines, "result = specdecode.generate(", *(f"    {each}," for each in given), ")"]) + "\n"


def _drafter(kind: str, options: Mapping[str, Any]) -> str:
    shape = options.get("shape", "chain")
    tree = []
    if shape == "static":
        branching = options.get("branching", [2] * 5)
        levels = repr(tuple(branching) if isinstance(branching, list) else branching)
        tree = [f"shape={_call('specdecode.StaticTree', levels, **_some(options, nodes='nodes'))}"]
    elif shape == "best-first":
        named = _some(options, nodes="nodes", threshold="threshold")
        tree = [f"shape={_call('specdecode.BestFirstTree', **named)}"]
    if kind == "lookup":
        return _call(
            "specdecode.PromptLookup", **_some(options, max_ngram="ngram", branches="branches", min_ngram="min_ngram")
        )
    if kind == "model":
        return _call("specdecode.ModelDrafter", "draft", *tree)
    if kind == "head":
        return _call("specdecode.HeadDrafter", "head", *tree)
    if kind == "universal":
        return _call("specdecode.UniversalDrafter", "target", "draft")
    if kind == "self-streaming":
        return _call("specdecode.SelfStreamingDrafter", "target", *tree, **_some(options, max_len="draft_cache"))
    return _call("specdecode.NoDraft")


def _controller(options: Mapping[str, Any]) -> str:
    kind = options.get("controller", "fixed")
    if kind == "adaptive":
        return _call("specdecode.AdaptiveK")
    if kind == "cost-aware":
        return _call("specdecode.CostAware", "specdecode.measure_costs(target, drafter)")
    return _call("specdecode.FixedK", repr(options.get("k", 5)))


def _some(options: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Those of the options that were given, by the names of arguments: what was not has the same default there."""
    return {argument: options[key] for argument, key in names.items() if key in options}


def _call(name: str, *expressions: str, **values: object) -> str:
    return f"{name}({', '.join([*expressions, *(f'{key}={value!r}' for key, value in values.items())])})"
