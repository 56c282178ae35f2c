"""Copies without a wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdecode
from specdecode.core.transfer import Copies, moved, write
from tests.helpers.root import ROOT


def test_a_device_gets_one_copy() -> None:
    """Guards against a copy for each layer, and against any on the tensor's own device."""
    tensor = torch.arange(3)
    copies = Copies(tensor)
    assert copies[torch.device("cpu")] is tensor
    there = copies[torch.device("meta")]
    assert there.device.type == "meta"
    assert copies[torch.device("meta")] is there


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False), ("cuda:1", False), ("mps", False)])
@pytest.mark.usefixtures("unchecked")
def test_a_copy_to_the_host_is_waited_for(device: str, waits: bool) -> None:
    """Guards against wrong tokens because the host reads a copy before it has arrived: a draft's proposals on a GPU,
    judged by a target on the CPU.
    """
    asked: dict[str, Any] = {}
    written: dict[str, Any] = {}

    class Elsewhere:
        device: torch.device

        def to(self, where: torch.device, **how: Any) -> str:
            asked.update(how, where=where)
            return "copy"

        def copy_(self, source: str, **how: Any) -> None:
            written.update(how, source=source)

    tensor: Any = Elsewhere()
    tensor.device = torch.device(device)
    result: Any = moved(tensor, torch.device(device))
    assert result == "copy"
    assert asked == {"where": torch.device(device), "non_blocking": not waits}
    source: Any = "source"
    write(tensor, source)
    assert written == {"source": "source", "non_blocking": not waits}


def test_no_other_copy_goes_unwaited_for() -> None:
    """Guards against a copy without a wait anywhere else in the package."""
    package = ROOT / specdecode.__name__
    found = [str(file.relative_to(package)) for file in package.rglob("*.py") if "non_blocking" in file.read_text()]
    assert found == ["core/transfer.py"]
