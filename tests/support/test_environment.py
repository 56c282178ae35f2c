from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import accumulate, chain
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from specdecode import LM
from specdecode.backends.device import synchronise
from specdecode.bench.measure import bandwidth
from specdecode.bench.measure.bandwidth import read_bandwidth, roofline_throughput
from specdecode.bench.measure.counters import host_reads, peak_memory
from specdecode.bench.runs.records import Header, Identity
from specdecode.support import environment as environment_module
from specdecode.support.environment import conditions, cpu_name, environment, hardware
from tests.helpers.models import ARCHITECTURES, build

IDENTITY = Identity("gpu", "t", "d", "float16", "quick")


def warned(**told: str) -> list[str]:
    return Header(IDENTITY, 1, {}, 0.0, conditions={"before": {}, "after": told}).warnings


def test_a_throttled_or_shared_gpu_is_told() -> None:
    """Guards against a slowdown blamed on the code although the GPU was throttled or shared."""
    assert warned() == []
    assert warned(**{"clocks_throttle_reasons.active": "0x0000000000000001"}) == []
    assert warned(**{"clocks_throttle_reasons.active": "[N/A]"}) == []
    hot = warned(**{"clocks_throttle_reasons.active": "0x0000000000000021"})
    assert hot == ["after the run the GPU was throttled (reasons 0x0000000000000021)"]
    assert warned(processes="100, 512 MiB") == []
    assert warned(processes="100, 512 MiB; 101, 2 MiB") == ["after the run other processes were on the GPU"]


class Driver:
    """A stand-in for pynvml with one GPU.

    Args:
        failing: names of functions that the driver or the GPU does not support.
    """

    NVMLError, NVMLLibraryMismatchError = pynvml.NVMLError, pynvml.NVMLLibraryMismatchError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.sessions = 0
        self.answers: dict[str, Callable[..., object]] = {
            "nvmlInit": lambda: self._session(+1),
            "nvmlShutdown": lambda: self._session(-1),
            "nvmlSystemGetDriverVersion": lambda: "570.1",
            "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-1234": "handle"}[uuid],
            "nvmlDeviceGetClockInfo": lambda gpu, clock: {
                ("handle", pynvml.NVML_CLOCK_SM): 1755,
                ("handle", pynvml.NVML_CLOCK_MEM): 2619,
            }[gpu, clock],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 40,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x21,
            "nvmlDeviceGetPowerUsage": lambda gpu: 120_000,
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [
                SimpleNamespace(pid=100, usedGpuMemory=512 * 2**20),
                SimpleNamespace(pid=101, usedGpuMemory=None),
            ],
        }

    def _session(self, change: int) -> None:
        self.sessions += change

    def __getattr__(self, name: str) -> Callable[..., object]:
        def answer(*arguments: object) -> object:
            assert name == "nvmlInit" or self.sessions == 1, f"{name} is asked outside a session"
            if name in self.failing:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self.answers[name](*arguments)

        return answer


def conditions_with(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> dict[str, str]:
    """Return the conditions of the GPU "1234", without the load of the processor."""
    monkeypatch.setattr("specdecode.support.environment.pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    found = conditions(torch.device("cuda"))
    assert float(found.pop("load average")) >= 0
    assert driver.sessions == 0
    return found


def test_the_gpus_state_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against values that are swapped or in other units, another GPU's state, and sessions that are left
    open.
    """
    found = conditions_with(monkeypatch, Driver())
    assert found == {
        "clocks.sm": "1755 MHz",
        "clocks.mem": "2619 MHz",
        "temperature.gpu": "40",
        "clocks_throttle_reasons.active": "0x0000000000000021",
        "power.draw": "120.00 W",
        "processes": "100, 512 MiB; 101, [N/A]",
    }
    assert len(warned(**found)) == 2


def test_a_driver_that_does_not_answer_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against minutes of measuring lost to a missing driver, or to a GPU that does not report its power."""
    assert conditions_with(monkeypatch, Driver("nvmlInit")) == {}
    assert conditions_with(monkeypatch, Driver("nvmlDeviceGetHandleByUUID")) == {}
    found = conditions_with(monkeypatch, Driver("nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses"))
    assert found["power.draw"] == found["processes"] == "[N/A]"
    assert found["clocks.sm"] == "1755 MHz"
    assert warned(processes=found["processes"]) == []


def test_the_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against versions without the driver's, and a run that fails where the driver does not report it, or where
    NVIDIA's package for that is missing.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr("specdecode.support.environment.pynvml", Driver())
    assert environment()["driver"] == "570.1"
    monkeypatch.setattr("specdecode.support.environment.pynvml", Driver("nvmlSystemGetDriverVersion"))
    assert "driver" not in environment()
    monkeypatch.setattr("specdecode.support.environment.pynvml", None)
    assert "driver" not in environment()


def test_the_machine_is_described() -> None:
    """Guards against a baseline with another name each time, and against asking for a GPU where there is none."""
    assert conditions(torch.device("cpu")).keys() == {"load average"}
    assert environment()["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: A Fine: CPU\n", "A Fine: CPU"),
        ("cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC family 25 model 1"),
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC family 26 model 2"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "aarch64 0x41 0xd40"),
        ("", "aarch64"),
    ],
)
def test_processors_of_other_models_have_other_names(
    cpuinfo: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against times of two processors that are compared: Linux names no ARM processor, and rented machines hide
    the model."""
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(environment_module, "Path", lambda path: tmp_path / "cpuinfo")
    monkeypatch.setattr(environment_module.platform, "processor", lambda: "aarch64")
    assert cpu_name() == name


def test_hardware_is_the_processor_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against one baseline for two processors, or for two numbers of threads."""
    monkeypatch.setattr(environment_module, "cpu_name", lambda: "AMD EPYC family 26 model 2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert hardware(torch.device("cpu")) == "amd-epyc-family-26-model-2-3-threads"


def test_reads_of_tensors_are_counted() -> None:
    """Guards against a synchronisation that no counter sees."""
    x = torch.arange(4)

    def reads(action: Callable[[], object]) -> int:
        with host_reads(torch.device("cpu")) as counted:
            action()
        return counted[0]

    for read in (x.tolist, x[0].item, lambda: int(x[1]), lambda: bool(x[2] > 0), x.nonzero, lambda: x[x > 1]):
        assert reads(read) == 1
    assert reads(lambda: (x + 1, x[:2], x[torch.tensor([0])])) == 0


def test_a_gpu_tells_itself_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against waits in functions that are not listed, and other warnings that are lost. The GPU is a
    stand-in.
    """
    modes: list[str] = []

    def switch(mode: str) -> None:
        modes.append(mode)
        if mode == "warn":  # as PyTorch, once a process; the suites make warnings errors
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)

    def read() -> list[int]:
        with host_reads(torch.device("cuda")) as counted:
            for _ in range(3):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)
            warnings.warn("another", UserWarning, stacklevel=1)
            torch.arange(4).tolist()  # already in host memory
        return counted

    with pytest.warns(UserWarning, match="^another$") as others:
        assert read() == [3]
    assert len(others) == 1
    assert modes == ["warn", "default"]


def test_peak_memory_is_the_most_that_was_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against a sum of all allocations reported as the peak, and against a profiler that prints."""
    with peak_memory(torch.device("cpu")) as peak:
        for _ in range(5):
            torch.empty(1_000_000, dtype=torch.uint8)
        kept = torch.empty(500_000, dtype=torch.uint8)
    assert 1_000_000 <= peak[0] < 1_600_000
    assert len(kept) == 500_000
    assert capfd.readouterr().err == ""


def test_a_device_s_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against times that end when the work is launched, and not when it is done."""
    waited: list[object] = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    monkeypatch.setattr("torch.mps.synchronize", lambda: waited.append("mps"))
    for device in ("cpu", "cuda:1", "mps"):
        synchronise(torch.device(device))
    assert waited == [torch.device("cuda:1"), "mps"]


def test_the_bandwidth_is_of_the_fastest_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a mean, which other work on the machine lowers, and against bytes that are written."""
    read_s = iter([0.5, 0.25, 1.0, 0.125, *[2.0] * 100])
    times = accumulate(chain.from_iterable((0.0, next(read_s)) for _ in range(100)))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert read_bandwidth(torch.device("cpu")) == bandwidth._READ_BYTES / 0.125


def test_the_roofline_counts_what_a_forward_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against counting all rows of an embedding, or leaving out a tied one."""
    monkeypatch.setattr("specdecode.bench.measure.bandwidth.read_bandwidth", lambda device: 1e9)
    for ties in (True, False):
        target = LM(build(ARCHITECTURES["llama"] | {"tie_word_embeddings": ties}))
        embedding = target.model.get_input_embeddings().weight
        total = sum(parameter.nbytes for parameter in target.model.parameters())
        weights = total - (0 if ties else embedding.nbytes)
        assert roofline_throughput(target) == pytest.approx(1e9 / weights)
        config = target.model.config
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * embedding.element_size()
        assert roofline_throughput(target, 100) == pytest.approx(1e9 / (weights + 100 * token))
