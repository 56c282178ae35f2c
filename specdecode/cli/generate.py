"""`specdecode generate`: continue texts."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from specdecode.bench.arms.entry import ArmSpec
from specdecode.cli.output import say, say_json
from specdecode.cli.prompts import read_prompts, whole_text
from specdecode.support.messages import note, noted_if_slow
from specdecode.support.progress import progress

if TYPE_CHECKING:
    from specdecode import LM, Generation
    from specdecode.controllers.base import Controller
    from specdecode.drafters.base import Drafter


class DrafterKind(str, enum.Enum):
    none = "none"
    lookup = "lookup"
    model = "model"
    universal = "universal"
    self_streaming = "self-streaming"
    head = "head"
    mtp = "mtp"
    medusa = "medusa"
    cascade = "lookup+head"


class ControllerKind(str, enum.Enum):
    fixed = "fixed"
    adaptive = "adaptive"
    cost_aware = "cost-aware"


class Shape(str, enum.Enum):
    chain = "chain"
    static = "static"
    best_first = "best-first"


_Prompt: TypeAlias = Annotated[str | None, typer.Argument(help="the text to continue")]
_Prompts: TypeAlias = Annotated[
    Path | None, typer.Option(help="file of prompts: one per line, or .jsonl with a field prompt; writes JSON")
]
_Target: TypeAlias = Annotated[str, typer.Option(help="embedded model, hub id, local folder or shape:NAME")]
_Draft: TypeAlias = Annotated[str | None, typer.Option(help="draft model; layers:0-9,29 uses these of the target")]
_Drafter: TypeAlias = Annotated[
    DrafterKind | None,
    typer.Option(
        help="how tokens are proposed  [default: lookup+head with a head, given or the target's, else lookup; with a"
        " draft: model, or universal if the vocabularies differ]"
    ),
]
_Head: TypeAlias = Annotated[
    str | None, typer.Option(help="folder or hub id of a draft head  [default: the target's own, if it has one]")
]
_Controller: TypeAlias = Annotated[
    ControllerKind,
    typer.Option(help="draft length: always --k, by recent acceptance, or by costs measured on this machine"),
]
_K: TypeAlias = Annotated[int | None, typer.Option(help="draft length  [default: 5]")]
_Tree: TypeAlias = Annotated[
    Shape | None,
    typer.Option(help="shape of a model's or a head's draft  [default: chain; best-first of 7 tokens with a head]"),
]
_Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy")]
_TopK: TypeAlias = Annotated[int, typer.Option(help="keep the k most probable tokens; 0 keeps all")]
_TopP: TypeAlias = Annotated[float, typer.Option(help="keep the most probable tokens up to this mass")]
_Seed: TypeAlias = Annotated[int | None, typer.Option(help="seed of the sampling")]
_MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="length limit")]
_Chat: TypeAlias = Annotated[bool, typer.Option("--chat", help="put the model's chat template around the prompt")]
_Stop: TypeAlias = Annotated[list[str] | None, typer.Option(help="string that ends the text; may be repeated")]
_Batch: TypeAlias = Annotated[int, typer.Option(help="number of prompts of a file that are decoded together")]
_AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="write a line of JSON instead of the text")]
_Logprobs: TypeAlias = Annotated[bool, typer.Option("--logprobs", help="add each token's log-probability to the JSON")]
_Device: TypeAlias = Annotated[str | None, typer.Option(help="cpu, cuda ...  [default: the first GPU, else the CPU]")]
_DeviceMap: TypeAlias = Annotated[
    str | None, typer.Option(help="auto: spread the target's layers over all GPUs, if one is too small")
]
_Dtype: TypeAlias = Annotated[
    str | None, typer.Option(help="float32, float16, bfloat16  [default: float32 on a CPU, else float16]")
]
_Backend: TypeAlias = Annotated[
    str,
    typer.Option(
        help="how forwards run: eager, packed, exact, compile, graph, triton, or auto, the fastest that starts quickly"
    ),
]
_Quantize: TypeAlias = Annotated[
    str | None, typer.Option(help="int8 or int4: the target's weights in 8 or 4 bits  [default: unquantised]")
]
_Policy: TypeAlias = Annotated[
    str | None, typer.Option(help="cache policy: sink-window, key-norm, heavy-hitter  [default: keep all tokens]")
]
_MaxCache: TypeAlias = Annotated[
    int | None, typer.Option(help="most tokens in the cache of a policy or a streaming draft  [default: 256]")
]


def generate(
    prompt: _Prompt = None,
    prompts: _Prompts = None,
    target: _Target = "smollm2-135m",
    draft: _Draft = None,
    drafter: _Drafter = None,
    head: _Head = None,
    controller: _Controller = ControllerKind.fixed,
    k: _K = None,
    tree: _Tree = None,
    temperature: _Temperature = 0.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    seed: _Seed = None,
    max_new_tokens: _MaxNewTokens = 128,
    chat: _Chat = False,
    stop: _Stop = None,
    batch: _Batch = 1,
    as_json: _AsJson = False,
    logprobs: _Logprobs = False,
    device: _Device = None,
    device_map: _DeviceMap = None,
    dtype: _Dtype = None,
    backend: _Backend = "auto",
    quantize: _Quantize = None,
    policy: _Policy = None,
    max_cache: _MaxCache = None,
) -> None:
    """Continue a text, stream it, and end with a line of measures; or continue many texts, as lines of JSON."""
    # Inputs are checked before a model is loaded where that is possible: importing torch alone takes seconds.
    texts = _texts(prompt, prompts, batch, in_json=as_json or prompts is not None, logprobs=logprobs)
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}: it must be at least 1")
    if temperature == 0:
        for option, is_set in (("--top-k", top_k != 0), ("--top-p", top_p != 1), ("--seed", seed is not None)):
            if is_set:
                raise ValueError(f"{option} is of no use at temperature 0, which is greedy: give --temperature, too")
    stops = [whole_text(string, "a stop string") for string in stop or ()]
    options = {
        "draft": draft,
        "drafter": drafter and drafter.value,
        "head": head,
        "controller": controller.value,
        "k": k,
        "shape": tree and tree.value,
        "quantize": quantize,
        "policy": policy,
    }
    spec = _spec(target, options, max_cache)
    from specdecode import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    how = {"device": device, "dtype": dtype, "backend": backend}
    decoder = _load(target, spec, how, device_map, drafter is None and spec.shape == "chain")
    tokens = [decoder.model.encode(text, chat=chat) for text in texts]
    rules: dict[str, Any] = {
        "policy": spec.cache_policy(),
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": decoder.model.stop_token_ids,
        "stop": stops,
    }
    if prompts or as_json:
        _write_json(decoder, texts, tokens, {"batch_size": batch, "logprobs": logprobs, **rules})
    else:
        _write_text(decoder, tokens[0], rules)


def _texts(prompt: str | None, prompts: Path | None, batch: int, *, in_json: bool, logprobs: bool) -> list[str]:
    """Return the texts to continue.

    Raises:
        ValueError: there is no text, or an option of the output does not fit the input.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("give either a prompt or a file of them with --prompts")
    if batch < 1:
        raise ValueError(f"--batch is {batch}: it must be at least 1")
    if batch != 1 and prompts is None:
        raise ValueError("--batch is for a file of prompts: name one with --prompts")
    if logprobs and not in_json:
        raise ValueError("--logprobs needs --json or --prompts: there is no place for them in the text")
    texts = read_prompts(prompts) if prompts else [whole_text(str(prompt), "the prompt")]
    if not all(texts):
        raise ValueError("the prompt is empty: give some text to continue")
    return texts


def _spec(target: str, options: Mapping[str, str | int | None], max_cache: int | None) -> ArmSpec:
    """Return the settings of decoding.

    Args:
        target: name of the target.
        options: values by the keys of an arm; None where an option was not given.
        max_cache: most tokens in the cache of a policy and of a streaming draft.

    Raises:
        ValueError: an impossible option, or options that exclude each other.
    """
    from specdecode.heads.loading import shipped_head
    from specdecode.models.embedded import EMBEDDED, EMBEDDED_DRAFT

    entry = {key: value for key, value in options.items() if value is not None}
    if entry.get("drafter") == "model" and target == EMBEDDED:
        entry.setdefault("draft", EMBEDDED_DRAFT)
    if max_cache is not None:
        bounded = {"cache": "policy" in entry, "draft_cache": entry.get("drafter") == "self-streaming"}
        if not any(bounded.values()):
            raise ValueError("--max-cache is of no use without --policy or --drafter self-streaming: leave it out")
        entry |= {key: max_cache for key, is_bounded in bounded.items() if is_bounded}
    ships_head = shipped_head(target) is not None
    spec = ArmSpec.from_command_line(entry, ships_head=ships_head)
    spec.check_head(target, ships_head=ships_head)
    return spec


@dataclass(frozen=True, slots=True)
class _Decoder:
    """A loaded model, its settings, and factories of the drafter and the controller of a text."""

    model: LM
    spec: ArmSpec
    make_drafter: Callable[[], Drafter]
    make_controller: Callable[[], Controller]


def _load(
    target: str, spec: ArmSpec, how: Mapping[str, Any], device_map: str | None, may_draft_by_text: bool
) -> _Decoder:
    """Load the models.

    Args:
        target: name of the target.
        spec: settings of decoding.
        how: arguments of `load` for target and draft.
        device_map: argument of `load` for the target alone.
        may_draft_by_text: whether a draft model with another vocabulary drafts by text without being asked to.

    Raises:
        ValueError, SpecDecodeError: a model or a head is not available, or they do not fit together.
    """
    from specdecode import TokenizerMismatchError, load
    from specdecode.bench.arms.parts import controller_maker, drafter_maker
    from specdecode.models.loading import check_vocabulary

    model = load(target, quantize=spec.quantize, device_map=device_map, **how)
    if model.tokenizer is None:
        raise ValueError(f"{target} has no tokenizer, so it cannot continue text: choose a model with a tokenizer")
    draft = None
    if spec.draft is not None:
        draft = load(spec.draft, target=model, same_vocabulary=False, **how)
        if spec.shares_vocabulary:
            try:
                check_vocabulary(model, draft)
            except TokenizerMismatchError:
                if not may_draft_by_text:
                    raise
                spec = replace(spec, drafter="universal")
                note(f"{spec.draft} has another vocabulary than {target}: it drafts by text (--drafter universal)")
    spec = spec.with_head_of(target)
    make_drafter = drafter_maker(spec, model, draft)
    with noted_if_slow("measuring the costs of drafting and verifying"):
        make_controller = controller_maker(spec, model, make_drafter)
    return _Decoder(model, spec, make_drafter, make_controller)


def _write_json(decoder: _Decoder, texts: list[str], tokens: list[list[int]], rules: Mapping[str, Any]) -> None:
    """Continue texts, and write a line of JSON as soon as a text is finished."""
    from specdecode import generate_batch

    with progress("prompts") as show:
        finished = itertools.count(1)

        def write(place: int, result: Generation) -> None:
            say_json(_fields(decoder.model, place, texts[place], result))
            show(next(finished), len(texts), f"prompt {place}")

        makers: dict[str, Any] = {"drafter": decoder.make_drafter, "controller": decoder.make_controller}
        generate_batch(decoder.model, tokens, on_finish=write, **makers, **rules)


def _fields(model: LM, place: int, prompt: str, result: Generation) -> dict[str, Any]:
    """Return the JSON object of one prompt's result."""
    fields = {
        "index": place,
        "prompt": prompt,
        "text": model.spelling.text(result.tokens, special=False),
        "finish_reason": result.finish_reason,
        "tokens": len(result.tokens),
        "tokens_per_second": result.throughput,
        "ttft_s": result.ttft_s,
        "mean_acceptance_length": result.mean_acceptance_length,
        "acceptance_rate": result.acceptance_rate if result.drafted else None,
    }
    if result.logprobs is not None:
        pairs = zip(model.spelling.pieces(result.tokens), result.logprobs, strict=True)
        fields["logprobs"] = [[piece, round(value, 6)] for piece, value in pairs]
    return fields


def _write_text(decoder: _Decoder, tokens: list[int], rules: Mapping[str, Any]) -> None:
    """Continue a text, write it step by step, and end with a line of measures."""
    from specdecode import generate as decode

    # Characters are written when their bytes are complete. Special tokens, such as the end of a turn, are left out.
    reader = decoder.model.spelling.reader(special=False)

    def write(new_tokens: list[int]) -> None:
        say("".join(map(reader.read, new_tokens)), end="")

    parts: dict[str, Any] = {"drafter": decoder.make_drafter(), "controller": decoder.make_controller()}
    result = decode(decoder.model, tokens, on_step=write, **parts, **rules)
    say("")
    _tell_measures(decoder, result)


def _tell_measures(decoder: _Decoder, result: Generation) -> None:
    from specdecode.backends.graph import CudaGraphs

    acceptance = f", acceptance {result.acceptance_rate:.0%}" if result.drafted else ""
    cache = f", {result.cache_bytes / 1e6:.1f} MB of KV after {result.compressions} evictions"
    note(
        f"{len(result.tokens)} tokens ({result.finish_reason}), {result.throughput:.1f} tokens/s,"
        f" τ {result.mean_acceptance_length:.2f}{acceptance}, TTFT {1e3 * result.ttft_s:.0f} ms"
        f"{cache if decoder.spec.policy else ''}, drafter {decoder.spec.drafter}, backend {decoder.model.backend}"
    )
    if result.capture_s:
        note(
            f"{CudaGraphs.count} CUDA graphs were captured in {result.capture_s:.1f} s, for which"
            f" {CudaGraphs.reserved / 1e6:.0f} MB were reserved: the figures above include neither"
        )
