"""The rooms of the package: folders, and single modules.

A room imports only from rooms above it in the list. Modules of one folder may import each other.
"""

from __future__ import annotations

ROOMS = [
    "core",
    "support",
    "policies",
    "controllers",
    "backends",
    "models",
    "heads",
    "drafters",
    "decoding",
    "bench/runs",
    "bench/presets",
    "bench/gate",
    "bench/servers",
    "bench/arms",
    "evals",
    "training",
    "bench/report",
    "bench/options",
    "bench/command_line",
    "bench/plan",
    "bench/measure",
    "bench/quality",
    "bench/pair",
    "bench/summary",
    "bench/worker",
    "bench/plugin",
    "cli",
    "__main__",
]
