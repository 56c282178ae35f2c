"""An arm's entry, read from a preset, a command line, lm-eval arguments or a run file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdecode import BestFirstTree, Chain, FixedK, KeepAll, SinkWindow, StaticTree
from specdecode.bench import presets
from specdecode.bench.arms.entry import ArmSpec, drafter_kinds
from specdecode.bench.arms.keys import MODEL_KEYS, PRESET_KEYS
from specdecode.bench.presets import preset
from specdecode.bench.runs.file import read
from specdecode.policies.key_norm import KeyNorm

PRESETS = sorted(file.stem for file in Path(presets.__file__).with_name("presets").glob("*.toml"))
BASELINES = Path(presets.__file__).parents[2] / "baselines"


def command(**options: Any) -> ArmSpec:
    return ArmSpec.from_command_line(options, ships_head=False)


def test_what_is_not_said_has_the_default_of_the_part() -> None:
    """Guards against a default that is written in two places and differs between them."""
    plain = ArmSpec.from_entry("ar", {})
    assert (plain.drafters, plain.needs_draft, plain.batch) == (["none"], False, 1)
    assert plain.fixed_k() == FixedK(5)
    assert isinstance(plain.cache_policy(), KeepAll)
    assert plain.tree_shape() == Chain()
    lookup = ArmSpec.from_entry("lookup", {"drafter": "lookup"}).prompt_lookup()
    assert (lookup.max_ngram, lookup.min_ngram, lookup.branches) == (3, 1, 1)
    tree = {"drafter": "model", "shape": "static"}
    assert ArmSpec.from_entry("tree", tree).tree_shape() == StaticTree((2,) * 5, 32)
    assert ArmSpec.from_entry("tree", {**tree, "k": 3}).tree_shape() == StaticTree((2,) * 3, 32)
    assert ArmSpec.from_entry("tree", {**tree, "shape": "best-first"}).tree_shape() == BestFirstTree(32, 0.1)
    window = ArmSpec.from_entry("window", {"policy": "sink-window"}).cache_policy()
    assert isinstance(window, SinkWindow)
    assert (window.keeps + window.interval, window.pinned) == (256, 4)


def test_what_is_said_reaches_its_part() -> None:
    """Guards against a key that is read and has no effect."""
    spec = ArmSpec.from_entry(
        "it",
        {"drafter": "lookup+model", "ngram": 4, "min_ngram": 2, "branches": 3, "k": 7}
        | {"shape": "static", "branching": [3, 1], "nodes": 9, "policy": "key-norm", "cache": 40, "recent": 2},
    )
    lookup = spec.prompt_lookup()
    assert (spec.drafters, spec.needs_draft, spec.fixed_k().k) == (["lookup", "model"], True, 7)
    assert (lookup.max_ngram, lookup.min_ngram, lookup.branches) == (4, 2, 3)
    assert spec.tree_shape() == StaticTree((3, 1), 9)
    policy = spec.cache_policy()
    assert isinstance(policy, KeyNorm)
    assert (policy.keeps + policy.interval, policy.recent) == (40, 2)
    tree = ArmSpec.from_entry("it", {"drafter": "head", "shape": "best-first", "nodes": 9, "threshold": 0})
    assert tree.tree_shape() == BestFirstTree(9, 0.0)


def test_a_preset_and_a_command_differ_where_nothing_is_said() -> None:
    """Guards against a preset's arm that changes with the recommended defaults, and against a command that drafts worse
    than it could.
    """
    entry = {"drafter": "lookup+head", "head": "h.safetensors"}
    arm = ArmSpec.from_entry("cascade", entry)
    assert (arm.tree_shape(), arm.prompt_lookup().min_ngram) == (Chain(), 1)
    for chosen in (command(**entry), ArmSpec.from_model_args(entry)):
        assert (chosen.tree_shape(), chosen.prompt_lookup().min_ngram) == (BestFirstTree(7, 0.05), 2)
        assert replace(chosen, shape="chain", nodes=None, threshold=None, min_ngram=None) == replace(arm, name="")
    assert command(**entry, shape="best-first").tree_shape() == BestFirstTree(32, 0.1)
    assert command(**entry, shape="chain").tree_shape() == Chain()
    assert ArmSpec.from_model_args({**entry, "ngram": 1}).prompt_lookup().min_ngram == 1


@pytest.mark.parametrize(
    ("options", "ships_head", "drafter"),
    [
        ({}, False, "lookup"),
        ({}, True, "lookup+head"),
        ({"draft": "d"}, False, "model"),
        ({"draft": "d"}, True, "model"),
        ({"head": "h.safetensors"}, False, "lookup+head"),
        ({"drafter": "none"}, True, "none"),
        ({"drafter": "universal", "draft": "d"}, False, "universal"),
    ],
)
def test_a_command_chooses_a_drafter(options: dict[str, Any], ships_head: bool, drafter: str) -> None:
    """Guards against a named draft model or head that is not used."""
    assert ArmSpec.from_command_line(options, ships_head=ships_head).drafter == drafter
    if not ships_head:
        assert ArmSpec.from_model_args(options).drafter == drafter


def test_lm_eval_reads_none_as_nothing() -> None:
    """Guards against `drafter=none`, which the harness parses as None, taken for the default drafter."""
    assert ArmSpec.from_model_args({"drafter": None}).drafter == "none"
    assert ArmSpec.from_model_args({"policy": None}).policy is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read(name: str) -> None:
    """Guards against a preset with a wrong arm that is found only on the machine of the preset, for example one with a
    GPU.
    """
    specs = {arm: ArmSpec.from_record(arm, entry) for arm, entry in preset(name).arms.items()}
    for arm, entry in preset(name).arms.items():
        assert specs[arm].drafters == drafter_kinds(entry)
        said = {key: list(value) if isinstance(value := getattr(specs[arm], key), tuple) else value for key in entry}
        assert said == entry


def test_every_arm_of_the_baselines_is_read() -> None:
    """Guards against a stored run file whose arms this version can no longer read."""
    records = [read(file).arms for file in BASELINES.glob("*/*.json") if file.parent.name != "quality"]
    specs = [ArmSpec.from_record(name, record.options) for arms in records for name, record in arms.items()]
    assert len(specs) > 10


def test_a_record_is_read_without_torch() -> None:
    """Guards against a report that takes seconds to import PyTorch, or fails where PyTorch is not installed."""
    entry = {"drafter": "lookup+model", "ngram": 2, "shape": "static", "policy": "sink-window", "quantize": "int8"}
    code = (
        "import json, sys; import specdecode.bench.arms.snippet; from specdecode.bench.arms.entry import ArmSpec\n"
        "ArmSpec.from_record('it', json.loads(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, json.dumps(entry)], check=False).returncode == 0


# Entries that are wrong wherever they are written. `test_arm` has the wrong entries of presets.

URL = {"url": "http://127.0.0.1:8000/v1"}


@pytest.mark.parametrize("backend", ["exact", "graph", "triton"])
def test_a_backend_is_not_refused_for_a_device_that_is_unknown(backend: str) -> None:
    """Guards against an arm that no machine can measure, or only one with the backend's package."""
    assert ArmSpec.from_entry("it", {"backend": backend}).backend == backend


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"k": "5"}, "arm 'it': k is '5': it must be a whole number"),
        ({"k": True}, "arm 'it': k is True: it must be a whole number"),
        ({"drafter": 3}, "arm 'it': drafter is 3: it must be a string"),
        ({"drafter": "model", "shape": "static", "branching": 2}, "branching is 2: it must be a list of whole numbers"),
        ({"drafter": "model", "shape": "static", "branching": [2.5]}, "it must be a list of whole numbers"),
        ({"drafter": "model", "shape": "static", "branching": []}, r"arm 'it': branching is \(\)"),
        ({"drafter": "lookup", "nodes": 4}, "arm 'it': nodes is of no use with the shape 'chain'"),
        ({"drafter": "lookup", "shape": "static"}, "arm 'it': shape is of no use with the drafter 'lookup'"),
        ({"drafter": "model", "ngram": 2}, "arm 'it': ngram is of no use with the drafter 'model'"),
        ({"drafter": "lookup+model", "draft_cache": 9}, "draft_cache is of no use with the drafter 'lookup.model'"),
        ({"drafter": "model", "shape": "static", "threshold": 0.1}, "threshold is of no use with the shape 'static'"),
        ({"replay": 0.5}, "arm 'it': replay is of no use with the drafter 'none'"),
        ({"drafter": "lookup", "replay": 1.5}, "arm 'it': acceptance is 1.5"),
        ({"drafter": "lookup+none"}, "arm 'it': the drafter 'lookup.none' is no cascade"),
        ({"drafter": "lookup+lookup"}, "arm 'it': the drafter 'lookup.lookup' is no cascade"),
        ({"cache": 64}, "arm 'it': cache is of no use without a policy"),
        ({"confidence": 0.5}, "arm 'it': confidence is of no use without a peer"),
        ({"draft": "d"}, "arm 'it': it has unknown options: draft; choose from drafter, "),
        ({"peer": "generate", "k": 5}, "arm 'it': it has unknown options: k; choose from peer, quantize, against"),
        ({"policy": "sink-window", "sinks": "a"}, "arm 'it': sinks is 'a': it must be a number"),
        (
            {"policy": "sink-window", "sinks": 1.5},
            "arm 'it': sinks of the cache policy sink-window is 1.5: it must be a",
        ),
        ({"policy": "sink-window", "max_len": 9}, "arm 'it': the cache policy sink-window has no setting 'max_len'"),
        ({"policy": "sink-window", "speed": 9}, "arm 'it': the cache policy sink-window has no setting 'speed'"),
        (
            {"drafter": "self-streaming", "draft_cache": 3},
            "arm 'it': draft_cache is 3: .*; choose a larger draft_cache$",
        ),
        ({"backend": "fast"}, "arm 'it': no backend is named 'fast'"),
        (3, "arm 'it': its entry is 3: it must be a table of options"),
        ({"server": {}}, "arm 'it': server needs a url or a command, and not both"),
        ({"server": URL | {"command": "serve {port}"}}, "server needs a url or a command, and not both"),
        ({"server": {"url": "localhost:8000"}}, "server.url is 'localhost:8000': write http://HOST:PORT/v1"),
        ({"server": {"command": "serve"}}, r"server.command names no \{port\}"),
        ({"server": {"command": "serve '{port}"}}, "server.command cannot be read: No closing quotation"),
        ({"server": {"command": ""}}, "server.command is empty"),
        ({"server": URL | {"ready": "/health2"}}, "server.ready is of no use with a url: the server runs already"),
        ({"server": URL | {"alone": True}}, "server.alone is of no use with a url"),
        ({"server": {"command": "serve {port}", "ready": "health"}}, "server.ready is 'health': write a path"),
        ({"server": {"command": "serve {port}", "start_minutes": 0}}, "server.start_minutes is 0: it must be above 0"),
        ({"server": URL | {"engine": "trt"}}, "server.engine is 'trt': choose from vllm, sglang, llama.cpp, openai"),
        ({"server": URL | {"prompt": "chat"}}, "server.prompt is 'chat': choose from ids, text"),
        ({"server": URL | {"models": "m"}}, "server has unknown keys: models; choose from url, command, model"),
        ({"server": URL | {"model": 3}}, "server.model is 3: it must be a string"),
        ({"server": URL | {"prefix_cache": 1}}, "server.prefix_cache is 1: it must be true or false"),
        ({"server": URL | {"environment": {"A": 1}}}, "server.environment is .*: it must be a table of strings"),
        ({"server": "http://127.0.0.1"}, "server is 'http://127.0.0.1': it must be a table of options"),
        ({"server": URL, "concurrency": 0}, "arm 'it': concurrency is 0: it is 1 or more"),
        ({"server": URL, "concurrency": 4, "requests": 3}, "requests is 3: it must be at least the concurrency, 4"),
        ({"server": URL, "limit_s": 0}, "arm 'it': limit_s is 0: it must be above 0"),
        ({"server": URL, "k": 3}, "arm 'it': it has unknown options: k; choose from server, concurrency, requests"),
        ({"concurrency": 4}, "arm 'it': concurrency is for arms from code or of servers"),
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_told_with_its_arm(entry: Any, said: str) -> None:
    """Guards against a wrong key that silently measures another configuration, or fails only after a model is
    loaded.
    """
    with pytest.raises(ValueError, match=said) as raised:
        ArmSpec.from_entry("it", entry)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "from_a_shell", "from_the_harness"),
    [
        (
            {"drafter": "model"},
            "--drafter model needs a draft model: name one with --draft",
            "drafter=model needs a draft model: name one with draft=",
        ),
        (
            {"drafter": "lookup", "head": "h"},
            "--head is of no use with --drafter lookup: leave one of them out",
            "head=h is of no use with drafter=lookup: leave one of them out",
        ),
        (
            {"controller": "adaptive", "k": 3},
            "--k is of no use with --controller adaptive, which chooses it: leave it out",
            "k=3 is of no use with controller=adaptive, which chooses it: leave it out",
        ),
        (
            {"drafter": "lookup", "shape": "static"},
            "--tree is of no use with --drafter lookup: leave one of them out",
            "shape=static is of no use with drafter=lookup: leave one of them out",
        ),
        (
            {"policy": "sink-window", "cache": 4},
            "--max-cache is 4: .*; choose a larger --max-cache$",
            "cache is 4: .*; choose a larger cache$",
        ),
        ({"k": 0}, "K is 0: a draft needs at least 1 token", "K is 0: a draft needs at least 1 token"),
    ],
    ids=str,
)
def test_messages_name_keys_as_they_were_written(
    options: dict[str, Any], from_a_shell: str, from_the_harness: str
) -> None:
    """Guards against a message about an option name that its reader has never seen."""
    with pytest.raises(ValueError, match=f"^{from_a_shell}"):
        command(**options)
    with pytest.raises(ValueError, match=f"^{from_the_harness}"):
        ArmSpec.from_model_args(options)


def test_a_head_that_does_not_come_with_the_target_is_told() -> None:
    """Guards against a model that is loaded before a missing head is reported."""
    spec = command(drafter="head")
    spec.check_head("m", ships_head=True)
    with pytest.raises(ValueError, match="no head comes with m: name the folder of one with --head, or choose another"):
        spec.check_head("m", ships_head=False)
    command(drafter="head", head="h.safetensors").check_head("m", ships_head=False)
    assert spec.with_head_of("m").head == "m"
    assert command(head="h.safetensors").with_head_of("m").head == "h.safetensors"
    assert command().with_head_of("m").head is None


def test_lm_eval_takes_no_key_of_measuring() -> None:
    """Guards against lm-eval scoring a peer, or a set acceptance rate, instead of the model."""
    measuring = {
        "backend",
        "replay",
        "batch",
        "peer",
        "confidence",
        "early_exit",
        "against",
        "baseline",
        "call",
        "options",
        "limit_s",
        "lossy",
        "server",
        "concurrency",
        "requests",
    }
    assert {*PRESET_KEYS} - {*MODEL_KEYS} == measuring
    with pytest.raises(ValueError, match="model_args has the unknown key 'peer': choose from target, draft"):
        ArmSpec.from_model_args({"peer": "generate"}, ("target", *MODEL_KEYS))
