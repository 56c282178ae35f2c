"""Python code that decodes as an arm did."""

from __future__ import annotations

from typing import Any

from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.runs.records import RunFile


def code_snippet(run: RunFile, arm: str) -> str:
    """Return Python code that decodes as the arm did. All values from the file are literals in it.

    Raises:
        ValueError: this version does not know the arm.
    """
    try:
        spec = ArmSpec.from_record(arm, run.arms[arm].options)
    except ValueError as error:
        raise ValueError(f"{run.path} has an arm that this version cannot decode: {error}") from None
    identity = run.header.identity
    header = run.header
    several = max(header.processes, header.devices) > 1
    # The backend of a target on several devices is not its draft's.
    backend = spec.backend or ("auto" if several else header.versions.get("backend", "auto"))
    loading: dict[str, Any] = {
        "device": "cuda" if header.on_gpu else "cpu",
        "dtype": identity.dtype,
        "backend": backend,
    }
    draft_loading = loading | ({"device": header.draft_device} if header.draft_device else {})
    if header.devices > 1:
        loading = {"device_map": "auto"} | {key: value for key, value in loading.items() if key != "device"}
    quantize = {} if spec.quantize is None else {"quantize": spec.quantize}
    split = {"tp": "auto"} if header.processes > 1 else {}
    lines = ["import specdecode", ""]
    if spec.policy is not None:
        lines.insert(1, "from specdecode.policies import policy")
    lines.append(f"target = {_call('specdecode.load', repr(identity.target), **loading, **quantize, **split)}")
    if spec.needs_draft:
        draft_target = "target"
        if quantize and identity.draft.startswith("layers:"):
            # The draft's weights are not quantised.
            draft_target = "plain"
            lines.append(f"plain = {_call('specdecode.load', repr(identity.target), **loading)}")
        by_text = {"same_vocabulary": False} if "universal" in spec.drafters else {}
        draft = _call("specdecode.load", repr(identity.draft), f"target={draft_target}", **draft_loading, **by_text)
        lines.append(f"draft = {draft}")
    if "head" in spec.drafters:
        lines.append(f"head = {_call('specdecode.load_head', repr(spec.head or identity.target), 'target')}")
    drafters = [_drafter(kind, spec) for kind in spec.drafters]
    lines.append(f"drafter = {drafters[0] if len(drafters) == 1 else _call('specdecode.Cascade', *drafters)}")
    arguments = ["target", "target.encode('Once upon a time')", "drafter=drafter"]
    if spec.drafter != "none":
        arguments.append(f"controller={_controller(spec)}")
    if spec.policy is not None:
        policy = _call("policy", repr(spec.policy), repr(spec.cache_tokens), **dict(spec.settings))
        arguments.append(f"policy={policy}")
    arguments += [f"max_new_tokens={run.header.max_new_tokens}", "stop_token_ids=target.stop_token_ids"]
    return "\n".join([*lines, "result = specdecode.generate(", *(f"    {one}," for one in arguments), ")"]) + "\n"


def _drafter(kind: str, spec: ArmSpec) -> str:
    if kind == "lookup":
        return _call("specdecode.PromptLookup", **spec.lookup_arguments)
    if kind == "model":
        return _call("specdecode.ModelDrafter", "draft", *_shape(spec))
    if kind == "head":
        return _call("specdecode.HeadDrafter", "head", *_shape(spec))
    if kind == "mtp":
        return _call("specdecode.HeadDrafter", "specdecode.load_mtp(target)", *_shape(spec))
    if kind == "medusa":
        heads = _call("specdecode.load_medusa", repr(spec.head), "target")
        return _call("specdecode.MedusaDrafter", heads, *_shape(spec))
    if kind == "universal":
        return _call("specdecode.UniversalDrafter", "target", "draft")
    if kind == "self-streaming":
        return _call("specdecode.SelfStreamingDrafter", "target", *_shape(spec), **spec.self_streaming_arguments)
    return _call("specdecode.NoDraft")


def _shape(spec: ArmSpec) -> list[str]:
    """Return the shape argument of a drafter; none for a chain, which is the default."""
    if spec.shape == "chain":
        return []
    name = "StaticTree" if spec.shape == "static" else "BestFirstTree"
    return [f"shape={_call(f'specdecode.{name}', **spec.tree_arguments)}"]


def _controller(spec: ArmSpec) -> str:
    if spec.controller == "adaptive":
        return _call("specdecode.AdaptiveK")
    if spec.controller == "cost-aware":
        return _call("specdecode.CostAware", "specdecode.measure_costs(target, drafter)")
    return _call("specdecode.FixedK", repr(spec.fixed_k().k))


def _call(name: str, *expressions: str, **values: object) -> str:
    return f"{name}({', '.join([*expressions, *(f'{key}={value!r}' for key, value in values.items())])})"
