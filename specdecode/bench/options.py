"""The options of a session."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """Values of the options in `pytest --help`. None leaves the choice to the preset or the hardware.

    Attributes:
        root: folder of the repository; `results/` is in it.
        baselines: folder of the baselines; a relative path is relative to `root`.
        tolerances: tolerances of single arms, by name, in place of `tolerance`.
        again: the most time for measuring disturbed runs again, as a share of the rest.

    Raises:
        ValueError: a count is below 1, or `again` is negative, infinite or not a number.
    """

    root: Path
    preset: str = "quick"
    target: str = "smollm2-135m"
    draft: str | None = None
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    tp: str | None = None
    device_map: str | None = None
    draft_device: str | None = None
    max_new_tokens: int | None = None
    prompts: str | None = None
    eos: bool = False
    tiny: bool = False
    repeats: int | None = None
    resume: bool = False
    gate: str = "on"
    tolerance: float | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    baselines: str = "baselines"
    baseline: str | None = None
    against: str | None = None
    until: float | None = None
    budget_minutes: float | None = None
    again: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("repeats", self.repeats), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if not 0.0 <= self.again < math.inf:
            raise ValueError(f"again is {self.again}: it is a share of the time, 0 or more")
