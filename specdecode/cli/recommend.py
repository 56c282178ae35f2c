"""`specdecode recommend`: what to use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from specdecode.cli.messages import note


def recommend(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run files, from pytest --benchmark --benchmark-json or from here")
    ] = None,
    target: Annotated[str | None, typer.Option(help="measure this model first; named as for generate")] = None,
    draft: Annotated[str | None, typer.Option(help="its draft model")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16  [default: float32 on a CPU, else float16]")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="how forwards run  [default: auto]")] = None,
    preset: Annotated[str | None, typer.Option(help="what to measure  [default: recommend]")] = None,
    prompts: Annotated[str | None, typer.Option(help="data sets and counts  [default: as the preset says]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="length of every output  [default: as the preset says]")
    ] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="how long to measure  [default: 10]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="run file of what is measured  [default: in results/, named as a baseline]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="write it for programs")] = False,
) -> None:
    """Tell what to use for throughput, memory, both and long texts, and why: by runs, or by what is measured now."""
    from specdecode.bench.report.recommend import as_json as json_of
    from specdecode.bench.report.recommend import recommend as advise
    from specdecode.bench.report.recommend import told
    from specdecode.bench.runs.file import read

    measuring = {
        "--draft": draft,
        "--device": device,
        "--dtype": dtype,
        "--backend": backend,
        "--preset": preset,
        "--prompts": prompts,
        "--max-new-tokens": max_new_tokens,
        "--budget-minutes": budget_minutes,
        "--out": out,
    }
    if bool(runs) == (target is not None):
        raise ValueError("give either run files or, to measure first, a model with --target")
    if target is None:
        if given := [option for option, value in measuring.items() if value is not None]:
            raise ValueError(f"{given[0]} is of no use without --target: leave it out")
        found = [(run, advise(run)) for run in map(read, runs or [])]
    else:
        from specdecode.bench.measure.time_boxed import measure_within
        from specdecode.bench.options import Options

        options = Options(
            root=Path(),
            preset=preset or "recommend",
            target=target,
            draft=draft,
            device=device,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            prompts=prompts,
            repeats=None,
            resume=False,
            tolerance=None,
            baseline=None,
            against=None,
            backend=backend or "auto",
            tiny=False,
            eos=False,
        )
        file = out or Path("results") / options.identity.file
        run, left_out = measure_within(options, 10.0 if budget_minutes is None else budget_minutes, file)
        note(f"{len(run.header.outputs)} prompts were measured; the run is in {file}")
        found = [(run, advise(run, left_out))]
    if as_json:
        typer.echo(json.dumps([json_of(*about) for about in found], ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    for about in found:
        console.print(told(*about), crop=False, highlight=False)
