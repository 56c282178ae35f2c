"""The runs that others are judged by: bless one, find it again."""

from __future__ import annotations

import json
import math
from pathlib import Path

from specdecode.bench.runs.file import KEY, read
from specdecode.bench.runs.names import MARGINS
from specdecode.bench.runs.records import Identity, RunFile
from specdecode.bench.runs.statistics import Estimate, detectable_slowdown
from specdecode.support.checked import read_json
from specdecode.support.files import write_whole

TOLERANCE = 0.05
"""By how much an arm may become slower, as a share, before the gate closes."""


MOST_UNSEEN = 0.10
"""The largest slowdown, as a share, that a baseline's own noise may hide."""


def bless(path: Path, baselines: Path, reason: str) -> Path:
    """Write a run to the baselines, with the reason in it.

    Returns:
        The baseline's file.

    Raises:
        ValueError: no reason, or the run is none to expect anything by: changes that are not committed, a wrong
            output, an arm that did not decode, or a machine so unsteady that no later run could see a slowdown of
            `MOST_UNSEEN` by it.
    """
    run = read(path)
    if not reason.strip():
        raise ValueError("the reason is empty: say why this run is what is to be expected")
    content = read_json(path)
    if content.get("commit_info", {}).get("dirty") is not False:
        raise ValueError(f"{path} was measured with changes that are not committed: commit them, and measure again")
    if wrong := [name for name, arm in run.arms.items() if arm.bugs]:
        raise ValueError(f"{path} has wrong outputs ({', '.join(wrong)}): it is no baseline")
    if failed := [name for name, arm in run.arms.items() if arm.failure]:
        raise ValueError(f"{path} has arms that did not decode ({', '.join(failed)}): it is no baseline")
    if (unseen := ever_sees(run)) > MOST_UNSEEN:
        raise ValueError(
            f"{path} is so noisy that no later run would see a slowdown below {unseen:.0%} by it: measure more"
            f" --repeats or prompts, or --until {MOST_UNSEEN:.0%}, or quiet the machine, until it is {MOST_UNSEEN:.0%}"
        )
    content[KEY]["reason"] = reason.strip()
    for private in ("node", "release"):  # a machine's name says nothing about its speed
        content.get("machine_info", {}).pop(private, None)
    file = baselines / run.header.identity.file
    write_whole(file, json.dumps(content, indent=1) + "\n")
    return file


def ever_sees(run: RunFile, tolerance: float = TOLERANCE) -> float:
    """Return the smallest slowdown, as a share, that a later run without any noise would detect by this one.

    Args:
        run: the baseline.
        tolerance: share by which a time may be worse.
    """
    floor = run.header.floor
    return detectable_slowdown(Estimate(1.0, math.exp(-floor), math.exp(floor)), tolerance)


def all_of(baselines: Path) -> list[Path]:
    """Return the files of all baselines in their folder.

    Raises:
        ValueError: there are none.
    """
    files = sorted(file for file in baselines.glob("*/*.json") if file.parent.name != MARGINS)
    if not files:
        raise ValueError(f"{baselines} has no baselines: bless a run first, or name the file of one")
    return files


def find(identity: Identity, baselines: Path) -> RunFile | None:
    """Find the baseline to judge such a run by: its hardware's, or another machine's, whose counters hold here too."""
    same_hardware = baselines / identity.file
    others = sorted(baselines.glob(f"*/{identity.file.name}"))
    return next((read(path) for path in (same_hardware, *others) if path.exists()), None)
