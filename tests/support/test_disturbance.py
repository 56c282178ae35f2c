"""The share of the processors that other work takes."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from specdecode.support import disturbance
from specdecode.support.disturbance import watch
from specdecode.support.environment import throttled_s

_SPIN = """import os, time
print(os.getpid(), flush=True)
input()
while time.process_time() < 0.5: pass
print(flush=True)
input()
"""
_ORPHAN = """exec 3<&0; "$0" -c "$1" <&3 &"""

Everyone = namedtuple("Everyone", ["user", "nice", "system", "idle", "iowait", "steal", "guest"])
Own = namedtuple("Own", ["user", "system", "children_user", "children_system", "iowait"])


class Machine:
    """A machine whose clocks stand still until they are set.

    Attributes:
        everyone, own, seconds: the times of all processors, those of this process, and the clock.
    """

    def __init__(self, patch: pytest.MonkeyPatch, processors: int = 2) -> None:
        self.everyone, self.own, self.seconds = Everyone(*[0.0] * 7), Own(*[0.0] * 5), 0.0
        patch.setattr(disturbance.os, "cpu_count", lambda: processors)
        patch.setattr(disturbance.time, "perf_counter", lambda: self.seconds)
        patch.setattr(psutil, "cpu_times", lambda: self.everyone)
        patch.setattr(psutil.Process, "cpu_times", lambda process: self.own)
        patch.setattr(psutil.Process, "children", lambda process, recursive: [])


@pytest.mark.parametrize(
    ("everyone", "own", "share"),
    [
        (Everyone(2, 0, 0, 0, 0, 0, 0), Own(2, 0, 0, 0, 0), 0.0),  # its own work
        (Everyone(1, 0, 1, 0, 0, 0, 0), Own(0.5, 0.5, 0.5, 0.5, 0), 0.0),  # work of programs that it started
        (Everyone(2, 0, 0, 0, 0, 0, 0), Own(1, 0, 0, 0, 0), 0.5),  # another program's work
        (Everyone(1, 0, 0, 0, 0, 1, 0), Own(1, 0, 0, 0, 0), 0.5),  # another virtual machine's work
        (Everyone(1, 0, 0, 1, 0, 0, 0), Own(1, 0, 0, 0, 0), 0.0),  # idle
        (Everyone(1, 0, 0, 0, 1, 0, 0), Own(1, 0, 0, 0, 0), 0.0),  # idle, waiting for a disk
        (Everyone(2, 0, 0, 0, 0, 0, 1), Own(1, 0, 0, 0, 0), 0.5),  # work of a guest, which "user" includes too
    ],
)  # fmt: skip
def test_the_share_of_others(monkeypatch: pytest.MonkeyPatch, everyone: Everyone, own: Own, share: float) -> None:
    """Guards against own work, or idle time, counted as a disturbance."""
    machine = Machine(monkeypatch)
    taken = watch()
    machine.everyone, machine.own, machine.seconds = everyone, own, 1.0
    assert taken() == pytest.approx(share)


def test_a_quota_disturbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against a container that is throttled without a warning."""
    machine = Machine(monkeypatch)
    counts = tmp_path / "cpu.stat"
    counts.write_text("usage_usec 5\nthrottled_usec 1000000\n")
    monkeypatch.setattr(disturbance, "_CPU_STAT", counts)
    taken = watch()
    counts.write_text("usage_usec 5\nthrottled_usec 1500000\n")
    machine.seconds = 1.0
    assert taken() == pytest.approx(0.25)


def test_what_is_not_known_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a machine that reports nothing treated as a quiet one."""
    monkeypatch.setattr(psutil, "cpu_times", lambda: (_ for _ in ()).throw(psutil.AccessDenied()))
    assert watch()() is None
    monkeypatch.setattr(disturbance, "psutil", None)
    assert watch()() is None


def test_a_gpu_that_is_held_down_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a false comparison where the GPU's clocks fell in only one of the runs. The driver is a
    stand-in.
    """
    machine = Machine(monkeypatch)
    violations = iter([0, 3 * 10**8, 0, 4 * 10**8])  # by heat and by power, before and after

    class Gpu:
        violationTime = property(lambda self: next(violations))

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetViolationStatus", lambda gpu, policy: Gpu())
    taken = watch(device=torch.device("cuda"))
    machine.seconds = 0.5
    assert taken() == pytest.approx(0.2)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError(1)))
    assert throttled_s(torch.device("cuda")) is None


@pytest.mark.parametrize("child", [True, False], ids=["a child", "another process"])
def test_a_process_that_works_for_this_one_is_no_other(child: bool) -> None:
    """Guards against workers whose own work counts as a disturbance. This test reads the real system."""
    # A process is no longer a child once its parent has ended.
    command = [sys.executable, "-c", _SPIN] if child else ["sh", "-c", _ORPHAN, sys.executable, _SPIN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid = int(process.stdout.readline())
        other, worker = watch(), watch(pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        taken, of_worker = other(), worker()
        process.communicate(b"\n")
    assert taken is not None
    assert of_worker is not None
    # The process takes half of the processors, or a quarter where others are busy.
    assert taken == pytest.approx(of_worker, abs=0.1) if child else taken > of_worker + 0.1
