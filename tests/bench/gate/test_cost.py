"""The cost of judging: which modules are not imported, and how often a bootstrap is drawn. No test asserts a time."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdecode.bench.gate import verdicts
from specdecode.bench.gate.verdicts import judge
from specdecode.bench.runs.file import parse, read
from specdecode.bench.runs.statistics import Estimate, typical_ratio
from tests.helpers.root import ROOT

(BASELINE,) = (ROOT / "baselines").glob("*threads/*-quick.json")
HEAVY = {"torch", "transformers", "scipy", "matplotlib", "datasets", "huggingface_hub", "pytest"}


def test_the_gate_loads_nothing_heavy(tmp_path: Path) -> None:
    """Guards against seconds of imports before each verdict."""
    code = (
        "import sys; from specdecode import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"print('loaded', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "gate", str(BASELINE), str(BASELINE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "14 verdicts, none fails" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded"


def test_each_time_is_estimated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against slow judging: estimates for arms that are not judged, repeated estimates for one arm, or
    resampling, which takes longer than all the rest.
    """
    content = json.loads(BASELINE.read_text())
    faster: dict[str, Any] = copy.deepcopy(content)
    for record in faster["specdecode"]["arms"].values():
        for row in record["rows"].values():
            row["log_speedup"] += random.random()  # a run that no other test has cached
    estimates = 0

    def counted(*arguments: Any) -> Estimate:
        nonlocal estimates
        estimates += 1
        return typical_ratio(*arguments)

    monkeypatch.setattr(verdicts, "typical_ratio", counted)
    monkeypatch.setattr(np.random, "default_rng", None)
    judgements = judge(parse(json.dumps(faster), Path("new.json")), read(BASELINE))
    timed = [judged.arm for judged in judgements if judged.change is not None]
    assert len(judgements) == 14
    assert estimates == len(timed) == 3
