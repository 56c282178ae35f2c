"""What a time depends on besides the code."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from specdecode.bench.names import slug

_COPY_BYTES = 2**28


def environment() -> dict[str, str | int]:
    """Versions and hardware, as plain values."""
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found


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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes on the device: the best of a few.

    Decoding one token streams all weights once, so this bounds what any backend can reach.
    """
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = max(best, 2 * _COPY_BYTES / (time.perf_counter() - started))
    return best


def synchronise(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
