"""The examples, each measured by its preset on a small model."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import yaml

from specdecode.bench.arms.callables import ModelNames
from specdecode.bench.arms.entry import ArmSpec
from specdecode.bench.arms.models import load_models
from specdecode.bench.measure.experiment import Results, experiment
from specdecode.bench.presets import preset
from specdecode.bench.servers.process import words_of
from tests.helpers.learnt import learnt
from tests.helpers.root import ROOT
from tests.helpers.spelling import characters

EXAMPLES = ROOT / "examples"
TOKENS = 24  # longer than in the counters run
TEXT = "one two three one two three one two three one two three "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a small model that repeats a text, so that drafts by lookup are accepted. Return its folder."""
    folder = tmp_path_factory.mktemp("examples") / "model"
    repeating = learnt(characters(), TEXT)
    repeating.model.save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)


def measured(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> Results:
    """Measure the arms of an example on one short text."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    chosen = preset(str(EXAMPLES / f"{name}.toml"))
    chosen.check_baselines()
    models = load_models(ModelNames(target, "", "cpu", "float32"), "eager", chosen.arms.values())
    arms = [models.arm(arm, entry) for arm, entry in chosen.arms.items()]
    try:
        return experiment(
            arms, {"text/0": models.encoder.encode(TEXT)[: len(TEXT) // 2]}, TOKENS, baseline=chosen.baseline
        )
    finally:
        monkeypatch.delitem(sys.modules, name, raising=False)


# PyTorch's own warning when it prepares to compile.
@pytest.mark.filterwarnings("default:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "drafting"),
    [("own_drafter", "bigrams"), ("candidate_generator", "candidates"), ("compiled_generate", None)],
)
def test_an_example_decodes_as_its_baseline(
    name: str, drafting: str | None, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against examples that no longer run with the installed packages, that draft nothing, or that compile
    nothing: the example's own model, and the peer's.
    """
    compiled: list[object] = []
    compile_ = torch.compile

    def traced(function: Any, **options: Any) -> Any:
        """Trace a function, but make no code of it, which takes long."""
        compiled.append(function.__self__)
        return compile_(function, **options | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", traced)
    results = measured(name, model, monkeypatch)
    assert len(set(map(id, compiled))) == (2 if name == "compiled_generate" else 0)
    assert results.failures == {}
    assert {check for block in results.blocks for check in block.checks.values()} == {"equal"}
    if drafting is not None:
        run = results.blocks[0].runs[drafting]
        assert 1 <= run.counts.steps < TOKENS
        assert run.ttft_s < run.total_s / 2


@pytest.mark.skipif(find_spec("openvino_genai") is None, reason="needs openvino-genai: tox -e openvino")
def test_an_engine_of_others_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an engine whose tokens, steps or prompts differ from the requested ones."""
    results = measured("openvino_lookup", "smollm2-135m", monkeypatch)
    assert results.failures == {}
    (block,) = results.blocks
    assert block.runs["openvino"].tokens == block.runs["openvino-lookup"].tokens  # this text has no near ties
    assert block.runs["openvino"].counts.steps == TOKENS
    assert block.runs["openvino-lookup"].counts.steps < TOKENS


def test_the_preset_of_an_upgrade_is_read() -> None:
    """Guards against a preset that fails only on a machine with a GPU."""
    folder = EXAMPLES / "vllm_upgrade"
    chosen = preset(str(folder / "server.toml"))
    chosen.check_baselines()
    specs = [ArmSpec.from_entry(arm, entry) for arm, entry in chosen.arms.items()]
    assert all(spec.server is not None for spec in specs)
    for spec in specs:
        words = words_of(spec.server["command"], {"target": "T", "draft": "D", "port": 1})
        assert not [word for word in words if word in ("{target}", "{draft}", "{port}")]
        for word in words:
            if word.startswith("{"):
                assert json.loads(word)["num_speculative_tokens"] > 0
        assert (folder / words[0]).exists()


def test_the_workflow_of_an_upgrade_names_what_is_there() -> None:
    """Guards against a workflow that runs on no pull request."""
    folder = EXAMPLES / "vllm_upgrade"
    workflow = yaml.safe_load((folder / "workflow.yml").read_text())
    paths = workflow[True]["pull_request"]["paths"]  # YAML reads "on" as true
    assert [path for path in paths if not (folder / path).exists()] == []
    assert f"--preset {paths[-1]}" in str(workflow["jobs"])


def test_every_example_has_its_preset() -> None:
    """Guards against an example that the tests leave out."""
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"own_drafter", "candidate_generator", "compiled_generate", "openvino_lookup"}
    names |= {"vllm", "openvino_beside"}  # tested in tests/engines; and the code of openvino_lookup again
    assert names == {file.stem for file in EXAMPLES.glob("*.toml")}
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"{name}.toml" in text for name in names)
