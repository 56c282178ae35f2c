"""Copies that nobody waits for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import specdecode
from specdecode.core.transfer import moved
from tests.helpers.root import ROOT


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False), ("cuda:1", False), ("mps", False)])
@pytest.mark.usefixtures("unchecked")
def test_a_copy_to_the_host_is_waited_for(device: str, waits: bool) -> None:
    """Guards against a host that reads what has not arrived: proposals of a draft on a GPU that a target on the
    processor judges."""
    asked: dict[str, Any] = {}

    class Elsewhere:
        def to(self, where: torch.device, **how: Any) -> str:
            asked.update(how, where=where)
            return "copy"

    tensor: Any = Elsewhere()
    result: Any = moved(tensor, torch.device(device))
    assert result == "copy"
    assert asked == {"where": torch.device(device), "non_blocking": not waits}


def test_no_other_copy_goes_unwaited_for() -> None:
    """Guards against the same in another place."""
    package = ROOT / specdecode.__name__
    found = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"\.(to|cpu)\([^)]*non_blocking", file.read_text())
    ]
    assert found == ["core/transfer.py"]
