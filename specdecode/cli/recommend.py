"""`specdecode recommend`: recommend settings for a target, from measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdecode.cli.output import say_json, say_tables
from specdecode.support.messages import note

if TYPE_CHECKING:
    from specdecode.bench.report.recommend import Advice
    from specdecode.bench.runs.records import RunFile


def recommend(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run files, from pytest --benchmark --benchmark-json or from here")
    ] = None,
    target: Annotated[str | None, typer.Option(help="measure this model first; a name as for generate")] = None,
    draft: Annotated[str | None, typer.Option(help="its draft model")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16  [default: float32 on a CPU, else float16]")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="how forwards run  [default: auto]")] = None,
    preset: Annotated[str | None, typer.Option(help="preset to measure  [default: recommend]")] = None,
    prompts: Annotated[str | None, typer.Option(help="data sets and counts  [default: as the preset says]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="length of every output  [default: as the preset says]")
    ] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="minutes of measuring  [default: 10]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="run file of the measurement  [default: in results/, named as a baseline]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="write JSON, for programs")] = False,
) -> None:
    """Recommend settings for throughput, memory, both and long texts, with reasons, from runs or a new measurement."""
    from specdecode.bench.report.advice import as_json as json_of
    from specdecode.bench.report.advice import rich_advice
    from specdecode.bench.report.recommend import recommend as advise
    from specdecode.bench.runs.file import read

    options: dict[str, Any] = {
        "draft": draft,
        "device": device,
        "dtype": dtype,
        "backend": backend,
        "preset": preset,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "budget_minutes": budget_minutes,
        "out": out,
    }
    chosen = {name: value for name, value in options.items() if value is not None}
    if bool(runs) == (target is not None):
        raise ValueError("give either run files or, to measure first, a model with --target")
    if target is not None:
        recommendations = [_measured(target, **chosen)]
    elif chosen:
        raise ValueError(f"--{next(iter(chosen)).replace('_', '-')} is of no use without --target: leave it out")
    else:
        recommendations = [(run, advise(run)) for run in map(read, runs or [])]
    if as_json:
        say_json([json_of(*about) for about in recommendations])
        return
    for about in recommendations:
        say_tables(rich_advice(*about), highlight=False)


def _measured(
    target: str, *, budget_minutes: float = 10.0, out: Path | None = None, **options: Any
) -> tuple[RunFile, Advice]:
    """Measure a target, and return the run and its recommendation."""
    from specdecode.bench.measure.time_boxed import measure_within
    from specdecode.bench.options import Options
    from specdecode.bench.plan import resolve
    from specdecode.bench.report.recommend import recommend

    plan = resolve(Options(root=Path(), target=target, **{"preset": "recommend", **options}), judged=False)
    file = out or Path("results") / plan.identity.file
    run, left_out = measure_within(plan, budget_minutes, file)
    note(f"{len(run.header.outputs)} prompts were measured; the run is in {file}")
    return run, recommend(run, left_out)
