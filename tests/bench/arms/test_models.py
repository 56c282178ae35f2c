"""The models of a session's arms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdecode.bench.arms import models
from specdecode.bench.arms.callables import ModelNames
from specdecode.bench.arms.models import load_models
from specdecode.core.errors import ModelFileError
from specdecode.models.chat import TextEncoder
from specdecode.models.devices import CUDNN_ATTENTION, place
from specdecode.support.environment import environment


def test_a_server_needs_the_tokenizer_of_its_model(tmp_path: Path) -> None:
    """Guards against bytes sent to a server in place of its token ids."""
    names, server = ModelNames(str(tmp_path), "", "cpu", "float32"), {"server": {"url": "http://127.0.0.1:9/v1"}}
    with pytest.raises(ModelFileError, match="has no tokenizer here, and a server would get bytes"):
        load_models(names, "eager", [server])
    assert load_models(dataclasses.replace(names, target="shape:tiny"), "eager", [server]).servers is not None


def test_code_may_know_its_target_by_a_name_of_its_own() -> None:
    """Guards against arms from code that are refused, as their target is no folder on this machine."""
    for target in ("s3://bucket/model", "/nowhere/engine"):
        loaded = load_models(ModelNames(target, "", "cpu", "float32"), "eager", [{"call": "engine:make"}])
        assert loaded.encoder.encode("é") == [195, 169]
        with pytest.raises(ModelFileError, match=f"no such folder: {target}"):
            load_models(
                ModelNames(target, "", "cpu", "float32"), "eager", [{"server": {"url": "http://127.0.0.1:9/v1"}}]
            )


def test_models_are_loaded_to_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a target on one device, and a draft beside it, where options name several."""
    devices: dict[str, Any] = {}
    model = SimpleNamespace(tokenizer=None)

    def load(name: str, **how: Any) -> Any:
        devices[name] = (how["device"], how.get("device_map"))
        return model

    monkeypatch.setattr(models, "load", load)
    names = ModelNames("target", "draft", "cpu", "float32")
    for options, target, draft in (
        ({}, ("cpu", None), "cpu"),
        ({"device_map": "auto"}, (None, "auto"), "cpu"),
        ({"draft_device": "meta"}, ("cpu", None), "meta"),
    ):
        load_models(names, "auto", [{}], **options)
        assert devices == {"target": target, "draft": (draft, None)}
    for option in ("tp", "device_map", "draft_device"):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} is for models that this package decodes"):
            load_models(names, "auto", [{"call": "own:make"}], **{option: "auto"})


@pytest.fixture
def cudnn_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in for a GPU, and restore the attention switch afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr("specdecode.support.environment.pynvml.nvmlInit", lambda: None)
    monkeypatch.setattr("specdecode.support.environment.pynvml.nvmlSystemGetDriverVersion", lambda: "570")
    monkeypatch.setattr("specdecode.support.environment.pynvml.nvmlShutdown", lambda: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("device", "variable", "attention"), [("cuda:0", "", "off"), ("cpu", "", "on"), ("cuda:0", "1", "on")]
)
def test_no_attention_is_planned_anew_in_timed_runs(
    device: str, variable: str, attention: str, cudnn_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against peers slowed by cuDNN planning attention for each length, which makes our speedup look better than
    it is, and against a run with cuDNN's attention that measures another one. The settings of a user's own engine stay.
    """
    monkeypatch.setenv(CUDNN_ATTENTION, variable)
    monkeypatch.setattr(models, "load_encoder", lambda name: TextEncoder(name))
    load_models(ModelNames("target", "", device, "float16"), "auto", [{"call": "own:make"}])
    assert environment()["cudnn attention"] == "on"
    placed: list[torch.device] = []
    place(SimpleNamespace(to=placed.append), torch.device(device), None)  # type: ignore[arg-type]
    assert placed == [torch.device(device)]
    assert environment()["cudnn attention"] == attention
