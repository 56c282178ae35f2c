"""`python -m perf.smoke`, on a CPU and on the pretended device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from perf import smoke
from specdecode import generate
from tests.helpers import models

ON_GPU = torch.device(models.DEVICE).type == "cuda"


def test_a_machine_tells_what_it_runs(capsys: pytest.CaptureFixture[str], unchecked: None) -> None:
    """Guards against a kernel reported as missing because it was called wrongly, and minutes on a GPU that captures
    nothing or waits several times a step.
    """
    assert smoke.main(["--device", models.DEVICE]) == 0
    told = capsys.readouterr().out.splitlines()
    assert f"torch: {torch.__version__}" in told
    attention = [line for line in told if line.startswith("attention of")]
    assert [re.sub(r"attention of (.*): PyTorch takes .*", r"\1", line) for line in attention] == [
        "1 row with a mask",
        "8 rows with a mask",
        "a prompt without a mask",
    ]
    for line in attention:
        assert re.search(r"PyTorch takes \w+\. .* math [\d.]+ \([\d.]+\)$", line)
        assert ON_GPU or re.search(r"takes flash\. .* flash [\d.]+ \([\d.]+\), efficient none, cudnn none", line)
    plain, drafted = told[-2:]
    assert plain.startswith("plain decoding: tokens are those of transformers; 24 steps, ")
    assert re.match(r"drafts: tokens are those of transformers; \d+ steps, ", drafted)
    if ON_GPU:
        assert told[-3] == "backend: graph"
        for line in (plain, drafted):
            assert re.search(r", 1\.0 host reads in each; [1-9]\d* captures, then 0$", line)


def test_wrong_tokens_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unchecked: None
) -> None:
    """Guards against a broken backend that is found only after ten minutes of measuring it."""

    def wrong(*given: Any, **rules: Any) -> Any:
        result = generate(*given, **rules)
        result.tokens[-1] += 1
        return result

    monkeypatch.setattr(smoke, "generate", wrong)
    assert not smoke.decodes(torch.device(models.DEVICE))
    assert capsys.readouterr().out.count("tokens are WRONG") == 2
