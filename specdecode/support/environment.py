"""What a time depends on besides the code."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from specdecode.support.files import slug

_GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "clocks_throttle_reasons.active", "power.draw")


def environment() -> dict[str, str | int]:
    """Versions and hardware, as plain values."""
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    with suppress(PackageNotFoundError):
        found["torchao"] = version("torchao")
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        found |= {"driver": told["driver_version"]} if (told := _nvidia_smi("driver_version")) else {}
    return found


def conditions(device: torch.device) -> dict[str, str]:
    """What may change while a run lasts: on a GPU its clocks, temperature, throttling and processes, as `nvidia-smi`
    tells them; the load of the processor."""
    found = {"load average": f"{os.getloadavg()[0]:.2f}"}
    if device.type == "cuda":
        this = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        found |= _nvidia_smi(*_GPU_STATE, only=this)
        found |= {"processes": told} if (told := _ask_nvidia_smi("--query-compute-apps=pid,used_memory", this)) else {}
    return found


def _nvidia_smi(*queries: str, only: str = "--id=0") -> dict[str, str]:
    told = _ask_nvidia_smi(f"--query-gpu={','.join(queries)}", only)
    values = told.split("; ")[0].split(", ")
    return dict(zip(queries, values, strict=True)) if len(values) == len(queries) and told else {}


def _ask_nvidia_smi(query: str, only: str) -> str:
    """The answer's lines, put together by semicolons; empty where the program is missing or refuses."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, query, only, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else ""


def hardware(device: torch.device) -> str:
    """What times are tied to: the GPU's name, or the processor's model and cores, as a file name."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()} {torch.get_num_threads()} threads"
    return slug(name)


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
