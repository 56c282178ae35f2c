"""Baselines, the runs that later runs are judged by: blessing a run, and finding its baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from specdecode.bench.gate.series import backend, turns
from specdecode.bench.runs.file import KEY, read, run_json
from specdecode.bench.runs.names import ANY_HARDWARE, MARGINS
from specdecode.bench.runs.records import Identity, RunFile
from specdecode.bench.runs.statistics import Estimate, detectable_slowdown
from specdecode.support.checked import read_json
from specdecode.support.files import write_whole

TOLERANCE = 0.05
"""The share by which an arm may become slower before the gate fails."""

MOST_UNSEEN = 0.10
"""The largest slowdown, as a share, that a baseline's own noise may hide."""


def bless(paths: Sequence[Path], baselines: Path, reason: str, *, counters: bool = False) -> Path:
    """Write a run to the baselines, with the reason in it.

    Args:
        paths: file of the run; then files of runs of the same models, prompts and lengths on other machines of this
            hardware. Times are judged by them too.
        baselines: folder of the baselines.
        reason: why later runs should perform like this run.
        counters: whether to judge only counters by it, on any hardware. Then the times may be noisy.

    Returns:
        The baseline's file.

    Raises:
        ValueError: the reason is empty. Several runs are given with `counters`. A run cannot be a baseline: it was
            measured beside another commit, was stopped or out of time, names no commit, has uncommitted changes, a
            wrong output or an arm that did not decode, lacks arms of the replaced baseline that its session did not
            select, or differs from the first run in what `_subject` returns. Or the machines are so unsteady, or so
            different, that later runs could not detect a slowdown of `MOST_UNSEEN`.
    """
    if not reason.strip():
        raise ValueError("the reason is empty: say why later runs should perform like this run")
    runs = [one for path in paths for run in [read(path)] for one in (run, *run.together)]
    for run in runs:
        _check(run)
        if _subject(run) != _subject(runs[0]):
            raise ValueError(
                f"{run.path} cannot be blessed with {paths[0]}: hardware, models, data types, presets, arms, prompts,"
                " lengths, outputs, weights, backends, reference arms and turns (--until) must be equal"
            )
    run = replace(runs[0], together=runs[1:])
    identity = run.header.identity
    content = read_json(paths[0])
    if counters:
        if runs[1:]:
            raise ValueError("counters are the same on all machines: name one run")
        identity = replace(identity, hardware=ANY_HARDWARE)
        content[KEY]["identity"]["hardware"] = ANY_HARDWARE
    elif (unseen := ever_sees(run)) > MOST_UNSEEN:
        raise ValueError(
            f"{' and '.join(map(str, paths))}: no later run would detect a slowdown below {unseen:.1%} with this"
            f" baseline: measure more --repeats or prompts, or --until {MOST_UNSEEN:.0%}, or quiet the machine; the"
            f" limit is {MOST_UNSEEN:.0%}. Or bless --counters, and no times are judged"
        )
    content[KEY]["reason"] = reason.strip()
    if runs[1:]:
        content[KEY]["together"] = [{**run_json(other), "reason": reason.strip()} for other in runs[1:]]
    for private in ("node", "release"):  # a machine's name says nothing about its speed
        content.get("machine_info", {}).pop(private, None)
    file = baselines / identity.file
    _check_replaced(file, run)
    write_whole(file, json.dumps(content, indent=1) + "\n")
    return file


def _subject(run: RunFile) -> tuple[object, ...]:
    """Return the properties that runs must share to be blessed together: without them, times are not comparable."""
    header = run.header
    same = (
        header.identity.file,
        header.identity.models,
        header.outputs,
        header.max_new_tokens,
        header.baseline,
        run.arms.keys(),
    )
    return (*same, backend(run), turns(run), header.versions.get("weights"))


def _check(run: RunFile) -> None:
    """Raise ValueError if a run cannot be a baseline."""
    path, content = run.path, read_json(run.path)
    if turns(run) == "versions":
        raise ValueError(
            f"{path} was measured beside another commit, which is another measurement: measure without --against"
        )
    if run.header.left and run.header.budget_spent:
        raise ValueError(
            f"{path} lacks prompts, because its time budget was spent: measure again with more --budget-minutes"
        )
    if run.header.left:
        raise ValueError(f"{path} is a run that was stopped: complete it with the same command and --resume")
    commit = content.get("commit_info")
    if not isinstance(commit, dict) or "dirty" not in commit:
        raise ValueError(
            f"{path} does not name its commit: measure with pytest --benchmark --benchmark-json={path}, and without"
            " -k counters"
        )
    if commit["dirty"] is not False:
        raise ValueError(f"{path} was measured with changes that are not committed: commit them, and measure again")
    if wrong := [name for name, arm in run.arms.items() if arm.bugs]:
        raise ValueError(f"{path} has wrong outputs ({', '.join(wrong)}): correct these arms, and measure again")
    if failed := [name for name, arm in run.arms.items() if arm.failure]:
        raise ValueError(
            f"{path} has arms that did not decode ({', '.join(failed)}): correct or remove them, and measure again"
        )


def _check_replaced(file: Path, run: RunFile) -> None:
    """Raise ValueError if the run's session did not select arms of the baseline that it would replace."""
    try:
        replaced = read(file)
    except ValueError:
        return  # there is none, or no run can be judged by it
    if lost := [arm for arm in replaced.arms if arm in run.header.unselected]:
        raise ValueError(
            f"{run.path} lacks arms that its session did not select, and {file} has them ({', '.join(lost)}): measure"
            f" without -k, or delete {file} first to judge them no more"
        )


def ever_sees(run: RunFile, tolerance: float = TOLERANCE) -> float:
    """Return the smallest slowdown, as a share, that a later run without noise would detect with this baseline.

    Args:
        run: the baseline, with the runs that were blessed together with it. Their differences hide slowdowns too.
        tolerance: share by which a time may be worse.
    """
    runs = [run, *run.together]
    floor = max(one.header.floor for one in runs) + max(map(partial(_spread, runs), run.arms), default=0.0)
    return detectable_slowdown(Estimate(1.0, math.exp(-floor), math.exp(floor)), tolerance)


def _spread(runs: Sequence[RunFile], arm: str) -> float:
    """Return the range of an arm's mean log speedup over runs."""
    logs = [one.log_speedups(arm) for one in runs if arm in one.arms]
    means = [fmean(of_run.values()) for of_run in logs if of_run]
    return max(means, default=0.0) - min(means, default=0.0)


def all_of(baselines: Path) -> list[Path]:
    """Return the files of all baselines of times in their folder.

    Raises:
        ValueError: the folder has none.
    """
    files = sorted(file for file in baselines.glob("*/*.json") if file.parent.name not in (ANY_HARDWARE, MARGINS))
    if not files:
        raise ValueError(f"{baselines} has no baselines of times: bless a run first, or name the file of one")
    return files


def find(identity: Identity, baselines: Path) -> RunFile | None:
    """Find the baseline of an identity: one of the same hardware; else one of "any" hardware; else one of other
    hardware. The counters of each are valid here."""
    name = identity.file.name
    same_hardware, any_hardware = baselines / identity.file, baselines / ANY_HARDWARE / name
    others = sorted(baselines.glob(f"*/{name}"))
    return next((read(path) for path in (same_hardware, any_hardware, *others) if path.exists()), None)
