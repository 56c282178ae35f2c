from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from specdecode import LM
from specdecode.bench.measure.bandwidth import roofline
from specdecode.bench.measure.counters import HostReads, peak_memory
from specdecode.bench.runs.records import Header, Identity
from specdecode.support.environment import conditions, environment
from tests.helpers.models import ARCHITECTURES, build

IDENTITY = Identity("gpu", "t", "d", "float16", "quick")


def warned(**told: str) -> list[str]:
    return Header(IDENTITY, 1, {}, 0.0, conditions={"before": {}, "after": told}).warnings


def test_a_throttled_or_shared_gpu_is_told() -> None:
    """Guards against a slowdown blamed on the code, when the GPU was hot or somebody else's too."""
    assert warned() == []
    assert warned(**{"clocks_throttle_reasons.active": "0x0000000000000001"}) == []
    assert warned(**{"clocks_throttle_reasons.active": "[N/A]"}) == []
    hot = warned(**{"clocks_throttle_reasons.active": "0x0000000000000021"})
    assert hot == ["after the run the GPU was throttled (reasons 0x0000000000000021)"]
    assert warned(processes="100, 512 MiB") == []
    assert warned(processes="100, 512 MiB; 101, 2 MiB") == ["after the run other processes were on the GPU"]


def test_the_gpus_state_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against columns that change places, and against a driver that does not answer ending the run."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*--id=GPU-1234*clocks.sm*|*clocks.sm*--id=GPU-1234*) echo "1755 MHz, 2619 MHz, 40, 0x0, 120.00 W";;\n'
        '*compute-apps*) echo "100, 512 MiB"; echo "101, 2 MiB";;\n'
        '*driver*) echo "570.1";;\nesac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    properties = type("Properties", (), {"uuid": "1234"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = conditions(torch.device("cuda"))
    assert found["clocks.sm"] == "1755 MHz"
    assert found["power.draw"] == "120.00 W"
    assert found["processes"] == "100, 512 MiB; 101, 2 MiB"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert conditions(torch.device("cuda")).keys() == {"load average"}
    assert float(conditions(torch.device("cpu"))["load average"]) >= 0
    assert environment()["threads"] == torch.get_num_threads()


def test_reads_of_tensors_are_counted() -> None:
    """Guards against a synchronisation that no counter sees."""
    x = torch.arange(4)
    with HostReads(torch.device("cpu")) as reads:
        x + 1
        assert reads.count == 0
        for read in (x.tolist, x[0].item, lambda: int(x[1]), lambda: bool(x[2] > 0), x.nonzero, lambda: x[x > 1]):
            before = reads.count
            read()
            assert reads.count == before + 1
        x[:2], x[torch.tensor([0])]
        assert reads.count == 6
    with HostReads(torch.device("cuda")) as reads:
        x.tolist()  # it is in host memory already
    assert reads.count == 0


def test_peak_memory_is_the_most_that_was_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against a sum of all allocations, and against a profiler that talks."""
    with peak_memory(torch.device("cpu")) as peak:
        for _ in range(5):
            torch.empty(1_000_000, dtype=torch.uint8)
        kept = torch.empty(500_000, dtype=torch.uint8)
    assert 1_000_000 <= peak[0] < 1_600_000
    assert len(kept) == 500_000
    assert capfd.readouterr().err == ""


def test_the_roofline_counts_what_a_forward_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an embedding counted as read whole, or a tied one forgotten."""
    monkeypatch.setattr("specdecode.bench.measure.bandwidth.copy_bandwidth", lambda device: 1e9)
    for ties in (True, False):
        target = LM(build(ARCHITECTURES["llama"] | {"tie_word_embeddings": ties}))
        embedding = target.model.get_input_embeddings().weight
        total = sum(parameter.nbytes for parameter in target.model.parameters())
        assert roofline(target) == pytest.approx(1e9 / (total - (0 if ties else embedding.nbytes)))
