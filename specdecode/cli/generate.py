"""`specdecode generate`: continue texts."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdecode.support.progress import progress

if TYPE_CHECKING:
    from specdecode import LM, Generation
from specdecode.cli.messages import note, noted_if_slow


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
                note(f"{draft} has another vocabulary than {target}: it drafts by text (--drafter universal)")
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
        with noted_if_slow("measuring what drafting and verifying cost here"):
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
    note(
        f"{len(result.tokens)} tokens ({result.finish_reason}), {result.throughput:.1f} tokens/s,"
        f" τ {result.mean_acceptance_length:.2f}{acceptance}, TTFT {1e3 * result.ttft_s:.0f} ms{held},"
        f" drafter {kind.value}, backend {model.backend}"
    )
    if result.capture_s:
        note(
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
