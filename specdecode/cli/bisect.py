"""`specdecode bisect`: find the commit that made an arm slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdecode.cli.output import say, say_tables
from specdecode.support.messages import note

if TYPE_CHECKING:
    from specdecode.bench.gate.verdicts import Judgement
    from specdecode.bench.plan import Plan


def bisect(
    good: Annotated[str, typer.Argument(help="commit that is fast enough; all others are measured beside it")],
    bad: Annotated[str, typer.Argument(help="later commit that is too slow")],
    arm: Annotated[str, typer.Option("-k", "--arm", help="the arm whose speed is compared")],
    below: Annotated[float, typer.Option(help="a commit with less than this share of GOOD's speed is too slow")] = 0.97,
    preset: Annotated[
        str | None,
        typer.Option(help="preset that has the arm  [default: that of pyproject.toml, or quick]"),
    ] = None,
    target: Annotated[str | None, typer.Option(help="target model  [default: the embedded one]")] = None,
    draft: Annotated[str | None, typer.Option(help="its draft model")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16  [default: float32 on a CPU, else float16]")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="how forwards run  [default: auto]")] = None,
    prompts: Annotated[str | None, typer.Option(help="data sets and counts  [default: as the preset says]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="length of every output  [default: as the preset says]")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="repeats of each prompt; up to four times as many for an inconclusive commit  [default: as the preset"
            " says]"
        ),
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="rehearse in seconds, with the smallest models and texts")
    ] = False,
) -> None:
    """Find the first commit after a good one that makes an arm slow, up to a bad one. Each candidate is measured side
    by side with the good commit. A merged branch counts as one commit, its merge. Exit code 0: one commit is named; 1:
    BAD is not slow, or the runs do not decide; 2: an input is wrong."""
    from specdecode.bench.measure.bisect import Bisection, commits_between, conclusion, measured_commits
    from specdecode.bench.measure.versions import dependencies
    from specdecode.bench.report.grid import rich_table

    first, commits = commits_between(good, bad, Path())
    options: dict[str, Any] = {
        "preset": preset,
        "target": target,
        "draft": draft,
        "device": device,
        "dtype": dtype,
        "backend": backend,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "tiny": tiny or None,
    }
    plan = _plan(arm, first.id, below, {name: value for name, value in options.items() if value is not None})
    for commit in (first, commits[-1]):
        if changed := dependencies(Path(), commit.id):
            note(f"{commit.id} pins other packages ({', '.join(changed)}): all commits run with the installed ones")
    bisection = Bisection(commits, plan.preset.repeats)
    try:
        bisection.search(lambda commit, times: _judged(plan, arm, commit, times), note)
    finally:
        if any(trial.judgement for trial in bisection.trials.values()):
            say_tables(rich_table(measured_commits(bisection, first)))
            say(conclusion(bisection, first, below))
    if bisection.slow is None or len(bisection.suspects) > 1:
        raise typer.Exit(1)


def _plan(arm: str, good: str, below: float, options: dict[str, Any]) -> Plan:
    """Plan to measure an arm against the good commit. Options replace the repository's settings.

    Raises:
        ValueError: an impossible share, or an arm that the preset does not have.
    """
    from specdecode.bench.gate.project import read_project
    from specdecode.bench.options import Options
    from specdecode.bench.plan import resolve

    if not 0 < below <= 1:
        raise ValueError(f"--below is {below:g}: it is a share of the speed, above 0 and at most 1")
    settings = {name: value for name, value in read_project(Path()).options.items() if name != "tolerance"}
    plan = resolve(Options(root=Path(), against=good, tolerance=1 - below, **{**settings, **options}))
    if arm not in plan.preset.arms:
        raise ValueError(f"the preset has no arm {arm!r}: choose from {', '.join(plan.preset.arms)}")
    return plan


def _judged(plan: Plan, arm: str, commit: str, repeats: int) -> Judgement:
    """Measure a commit beside the plan's good commit, and return the gate's verdict on the time of the arm."""
    from specdecode.bench.measure.speed_session import measure
    from specdecode.core.errors import SpecDecodeError

    try:
        run = measure(replace(plan, preset=replace(plan.preset, repeats=repeats)), [arm], commit)
    except SpecDecodeError as error:
        raise ValueError(str(error)) from error
    if arm in run.outside:
        note(f"the code of {arm} is not in this repository: {plan.against} and {commit} ran the same")
    return next(judged for judged in run.judgements if (judged.arm, judged.gate) == (arm, "time"))
