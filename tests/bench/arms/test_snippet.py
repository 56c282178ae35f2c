"""The Python code snippet that decodes as an arm did."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from specdecode import load
from specdecode.bench.arms.arm import make_arm
from specdecode.bench.arms.snippet import code_snippet
from specdecode.bench.report.captions import command
from tests.helpers.characters import save
from tests.helpers.speed_runs import OUTPUT_TOKENS, speed_arm, speed_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drafter": "lookup", "ngram": 1, "branches": 3, "k": 2},
        {"drafter": "lookup"},
        {"drafter": "model", "controller": "adaptive"},
        {"drafter": "model", "shape": "static", "branching": [2, 1, 2], "nodes": 7, "k": 3},
        {"drafter": "model", "shape": "static"},
        {"drafter": "model", "shape": "best-first", "nodes": 6, "threshold": 0.01, "k": 4},
        {"drafter": "model", "shape": "best-first"},
        {"drafter": "universal", "k": 4},
        {"drafter": "self-streaming", "draft_cache": 32, "shape": "best-first", "k": 4},
        {"drafter": "lookup", "policy": "key-norm", "cache": 24, "k": 3},
        {"drafter": "lookup", "policy": "sink-window", "cache": 24, "sinks": 1, "interval": 3},
        {"drafter": "lookup+model", "min_ngram": 2, "shape": "static", "branching": [2, 1], "k": 3},
        {"drafter": "model", "quantize": "int8", "k": 2},
        {"drafter": "lookup", "backend": "packed"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_a_snippet_decodes_as_the_arm_did(model: str, options: dict[str, Any]) -> None:
    """Guards against a snippet that does not run when pasted, or that decodes with another configuration."""
    draft = "layers:0-2"
    run = speed_run(identity=("abacus", model, draft, "float64"), arm=speed_arm(1.0, options))
    pasted: dict[str, Any] = {}
    exec(code_snippet(run, "arm"), pasted)

    target = load(model, device="cpu", dtype="float64", backend="eager")
    smaller = load(draft, target=target)
    expected = make_arm("arm", options, target, smaller, "eager").run(
        target.encode("Once upon a time"), OUTPUT_TOKENS, ()
    )
    result = pasted["result"]
    assert result.tokens == expected.tokens
    counts = ("draft_forwards", "drafted", "accepted", "peak_cache_bytes", "compressions")
    assert {name: getattr(result, name) for name in counts} == {name: getattr(expected.counts, name) for name in counts}
    assert pasted["target"].weight_bytes == (target.quantized("int8") if "quantize" in options else target).weight_bytes
    assert pasted.get("draft", smaller).weight_bytes == smaller.weight_bytes
    if options.get("drafter") == "lookup":
        assert pasted["drafter"].max_ngram == options.get("ngram", 3)


@pytest.mark.usefixtures("unchecked")
def test_the_snippet_of_a_cost_aware_arm_runs(model: str) -> None:
    """Guards against a snippet that builds a cost-aware controller without its costs."""
    run = speed_run(
        identity=("abacus", model, "", "float64"), arm=speed_arm(1.0, {"drafter": "lookup", "controller": "cost-aware"})
    )
    pasted: dict[str, Any] = {}
    exec(code_snippet(run, "arm"), pasted)
    assert len(pasted["result"].tokens) == OUTPUT_TOKENS


def test_the_snippet_and_the_command_name_several_devices() -> None:
    """Guards against code that decodes on one device, or is refused, where several were measured."""
    arm = speed_arm(1.0, {"drafter": "model", "k": 2})
    run = speed_run(identity=("gpu-layers-x2-draft-on-cuda-1", "t", "d", "float16"), arm=arm)
    run.header.versions.update({"gpu": "GPU", "devices": 2, "draft device": "cuda:1"})
    snippet = code_snippet(run, "arm")
    assert "specdecode.load('t', device_map='auto', dtype='float16', backend='auto')" in snippet
    assert "specdecode.load('d', target=target, device='cuda:1', dtype='float16', backend='auto')" in snippet
    assert " --dtype=float16 --device-map=auto --draft-device=cuda:1 --prompts" in command(run)
    assert not {"--device=", "--backend="} & {option.partition("=")[0] + "=" for option in command(run).split()}


HOSTILE = "x') or exit(3) #"


@pytest.mark.parametrize("key", ["policy", "backend", "quantize", "head"])
def test_what_a_hostile_file_says_is_a_literal(key: str) -> None:
    """Guards against a run file that executes its own code on the machine of the user who pastes the snippet."""
    options = {"drafter": "model", "shape": "static", "policy": "sink-window", "sinks": 2} | {key: HOSTILE}
    if key == "head":
        options = {"drafter": "head", key: HOSTILE}
    snippet = code_snippet(
        speed_run(identity=("abacus", HOSTILE, HOSTILE, "float32"), arm=speed_arm(1.0, options)), "arm"
    )
    assert "exit" in snippet
    called = {".".join(_path(node.func)) for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)}
    assert all(name == "policy" or name.startswith(("specdecode.", "target.")) for name in called)


@pytest.mark.parametrize("key", ["k", "ngram", "branching", "nodes", "cache", "sinks", HOSTILE])
def test_there_is_no_snippet_of_what_is_no_arm(key: str) -> None:
    """Guards against code from a run file in place of a number or of a setting's name."""
    options = {"drafter": "model", "shape": "static", "policy": "sink-window"} | {key: HOSTILE}
    if key == "ngram":
        options = {"drafter": "lookup", key: HOSTILE}
    with pytest.raises(ValueError, match=r"^run\.json has an arm that this version cannot decode: arm 'arm': "):
        code_snippet(speed_run(arm=speed_arm(1.0, options)), "arm")


def _path(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_path(node.value), node.attr]
    assert isinstance(node, ast.Name)
    return [node.id]
