"""Describe the conditions of a measurement besides the code: versions, hardware, and the state of the hardware."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from specdecode.support.files import slug

try:
    import pynvml
except ImportError:  # GPU images may lack it; the driver is then not asked
    pynvml = None

_X86_NUMBERS = (("family", "cpu family"), ("model", "model"))
_NVML_ERRORS = () if pynvml is None else (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError)


def environment() -> dict[str, str | int]:
    """Return versions and names of the hardware, as plain values."""
    values: dict[str, str | int] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        values |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        values["cudnn attention"] = "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off"
        values |= _ask_driver(lambda: {"driver": pynvml.nvmlSystemGetDriverVersion()})
    return values


def conditions(device: torch.device) -> dict[str, str]:
    """Return the conditions that may change during a run: the load of the processor, and the state of a GPU.

    The state consists of clocks, temperature, throttling, power and processes, with the names and units of
    `nvidia-smi`. It is left out where the driver does not answer.
    """
    values = {"load average": f"{os.getloadavg()[0]:.2f}"}
    if device.type == "cuda":
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        values |= _ask_driver(lambda: _gpu_state(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    return values


def throttled_s(device: torch.device) -> float | None:
    """Return the seconds for which heat or power held down the clocks of a GPU, since a fixed moment.

    Returns:
        The seconds; None where the driver does not report them.
    """
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def question() -> dict[str, str]:
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        policies = (pynvml.NVML_PERF_POLICY_THERMAL, pynvml.NVML_PERF_POLICY_POWER)
        return {"ns": str(sum(pynvml.nvmlDeviceGetViolationStatus(gpu, policy).violationTime for policy in policies))}

    told = _ask_driver(question)
    return int(told["ns"]) * 1e-9 if told else None


def _ask_driver(question: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Return the answer of the NVIDIA driver; an empty dict where it or pynvml is missing, or it fails."""
    if pynvml is None:
        return {}
    try:
        pynvml.nvmlInit()
        try:
            return question()
        finally:
            pynvml.nvmlShutdown()
    except _NVML_ERRORS:
        return {}


def _gpu_state(gpu: Any) -> dict[str, str]:
    """Query the state of a GPU; "[N/A]" for values that it does not report.

    Args:
        gpu: NVML handle of the GPU.
    """
    queries: dict[str, Callable[[], str]] = {
        "clocks.sm": lambda: f"{pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)} MHz",
        "clocks.mem": lambda: f"{pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM)} MHz",
        "temperature.gpu": lambda: f"{pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)}",
        "clocks_throttle_reasons.active": lambda: f"{pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu):#018x}",
        "power.draw": lambda: f"{pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000:.2f} W",
        "processes": lambda: "; ".join(map(_process, pynvml.nvmlDeviceGetComputeRunningProcesses(gpu))),
    }
    state = {}
    for name, query in queries.items():
        try:
            state[name] = query()
        except _NVML_ERRORS:
            state[name] = "[N/A]"
    return {name: value for name, value in state.items() if value}


def _process(process: Any) -> str:
    """Describe a process on the GPU by its id and memory."""
    used = process.usedGpuMemory
    return f"{process.pid}, {'[N/A]' if used is None else f'{used // 2**20} MiB'}"


def hardware(device: torch.device) -> str:
    """Return the hardware of a measurement as a file name: the GPU's name, or the processor's model and threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()} {torch.get_num_threads()} threads"
    return slug(name)


def cpu_name() -> str:
    """Return the processor's model under the system's name."""
    # py-cpuinfo is not used: it runs five programs for a fifth of a second, and its names of ARM processors differ from
    # those of the baseline files. Two packages provide its module, and pytest-benchmark installs either of them.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if model := values.get("model name"):
        # Rented machines hide the model behind a name like "AMD EPYC". Its family and number tell the models apart.
        numbers = [f"{key} {values[name]}" for key, name in _X86_NUMBERS if name in values]
        return " ".join([model, *numbers])
    # Linux knows ARM processors by numbers alone.
    numbers = [values[name] for name in ("CPU implementer", "CPU part") if name in values]
    return " ".join([platform.processor() or platform.machine(), *numbers])
