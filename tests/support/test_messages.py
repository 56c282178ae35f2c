"""Notes on standard error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import huggingface_hub.constants
import pytest

from specdecode import load
from specdecode.core.errors import ModelFileError
from specdecode.evals.data import NotAtHandError, documents
from specdecode.heads import loading as heads
from specdecode.models import loading
from specdecode.models.loading import load_encoder
from specdecode.support import messages

WAYS: dict[str, Callable[[], object]] = {
    "a/model": lambda: load("a/model", device="cpu"),
    "a/tokenizer": lambda: load_encoder("a/tokenizer"),
    "a/head": lambda: heads.find_folder("a/head"),
    "Salesforce/wikitext": lambda: documents("wikitext-2"),
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let a hub fail as soon as the event is set, which a note does."""
    told, note = threading.Event(), messages.note

    def noted(text: str) -> None:
        note(text)
        told.set()

    def fail(*_: object, **__: object) -> NoReturn:
        assert told.wait(timeout=60)
        raise OSError("no answer")

    never = SimpleNamespace(from_pretrained=fail)
    monkeypatch.setattr(messages, "_SLOW_S", 0.02)
    monkeypatch.setattr(messages, "note", noted)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "AutoModelForCausalLM", never)
    monkeypatch.setattr(loading, "AutoTokenizer", never)
    monkeypatch.setattr(heads, "snapshot_download", fail)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    monkeypatch.delenv("SPECDECODE_DATA", raising=False)
    return told


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("name", list(WAYS))
def test_waiting_for_the_hub_is_told_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against half a minute of silence after the name of a model, a head or a data set."""
    if name == "a/tokenizer":
        WAYS[name]()  # without a tokenizer, texts are encoded as bytes
    else:
        with pytest.raises((ModelFileError, NotAtHandError)):
            WAYS[name]()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"loading {name} from the hub or a cache")


def test_a_hub_that_is_not_asked_is_not_waited_for(
    tmp_path: Path, told: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a note about the hub where a folder is slow to load, or is switched off."""
    timers: list[object] = []
    monkeypatch.setattr(messages, "threading", SimpleNamespace(Timer=lambda *of: timers.append(of)))
    told.set()
    with pytest.raises(ModelFileError):
        load(str(tmp_path), device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("a/model", "a/head"):
        with pytest.raises(ModelFileError):
            WAYS[name]()
    assert not timers
