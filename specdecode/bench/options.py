"""The options of a session, as the command line gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """What `pytest --help` lists; None where the preset or the hardware decides.

    Attributes:
        root: folder of the repository, with `baselines/` and `results/`.
    """

    root: Path
    preset: str = "quick"
    target: str = "smollm2-135m"
    draft: str | None = None
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    max_new_tokens: int | None = None
    prompts: str | None = None
    eos: bool = False
    tiny: bool = False
    repeats: int | None = None
    resume: bool = False
    gate: str = "on"
    tolerance: float | None = None
    baseline: str | None = None
    against: str | None = None
