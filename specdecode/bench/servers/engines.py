"""The protocols of serving engines: the requests to each engine and its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """A request to continue one prompt greedily.

    Attributes:
        prompt: token ids, or text.
        max_new_tokens: tokens of the output; stop tokens do not end it.
        model: the server's name of the model.
        logprobs: number of tokens with log-probabilities at each position; 0 requests none.
        others: further keys of the body.
    """

    prompt: Sequence[int] | str
    max_new_tokens: int
    model: str
    logprobs: int = 0
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Speculation:
    """An engine's report on its own speculation. A field is None if the engine does not report it.

    Attributes:
        drafts: number of steps that verified a draft.
        drafted: proposed tokens.
        accepted: proposals kept.
        by_position: number of proposals kept at each position, from the first.
    """

    drafts: float | None = None
    drafted: float | None = None
    accepted: float | None = None
    by_position: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The content of one event of a stream.

    Attributes:
        tokens: new token ids; None if the event has no ids.
        text: new text.
        count: number of tokens of the output so far, as the server counts.
        cached: number of tokens of the prompt from the server's prefix cache.
        model: name of the model that answers.
        finished: reason why the output ended; "" while it continues.
        speculation: report on speculation, at the end.
        logprobs: log-probabilities of some tokens, by id, for each new token.
    """

    tokens: Sequence[int] | None = None
    text: str = ""
    count: int | None = None
    cached: int | None = None
    model: str | None = None
    finished: str = ""
    speculation: Speculation | None = None
    logprobs: Sequence[Mapping[int, float]] = ()


@dataclass(slots=True)
class Response:
    """One output and its times, as far as it has come.

    Attributes:
        tokens: token ids; empty if the server does not send them.
        text: text of the output.
        sizes: number of tokens in each arrival, or 1 for a piece of text.
        times: seconds from the request to each arrival.
        count: number of tokens of the output, as the server counts them.
        cached: number of tokens of the prompt from the server's prefix cache; None if not reported.
        finished: reason why the output ended.
        speculation: the server's report on its speculation.
        logprobs: log-probabilities of some tokens, by id, for each token.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    count: int | None = None
    cached: int | None = None
    finished: str = ""
    speculation: Speculation | None = None
    logprobs: list[Mapping[int, float]] = field(default_factory=list)

    def add(self, piece: Piece, seconds: float) -> None:
        """Append a piece that came some seconds after the request."""
        # The end of an output without any text is an arrival, too: its only token is half a character, or ended it.
        new = len(piece.tokens or ()) or int(bool(piece.text or (piece.finished and not self.sizes)))
        if new:
            self.sizes.append(new)
            self.times.append(seconds)
        self.tokens += piece.tokens or ()
        self.text += piece.text
        self.count = self.count if piece.count is None else piece.count
        self.cached = self.cached if piece.cached is None else piece.cached
        self.finished = piece.finished or self.finished
        self.speculation = piece.speculation or self.speculation
        self.logprobs += piece.logprobs


@dataclass(frozen=True, slots=True)
class Engine:
    """The protocol of an engine.

    Attributes:
        name: name in presets and messages.
        path: path that requests are posted to.
        body: function that builds a request's body.
        piece: function that reads an event of a stream. It also gets the number of tokens that came before.
        version: path that answers with the engine's version, and the key of the version; None without such a path.
        metrics: names of the counters at "/metrics", by field of `metrics.Counted`; empty without counters.
        token_by_token: whether tokens are sent one by one, even if a step committed several.
        loses_ids: whether no ids are sent for tokens that end within a character.
    """

    name: str
    path: str
    body: Callable[[Request], dict[str, Any]]
    piece: Callable[[Mapping[str, Any], int], Piece]
    version: tuple[str, str] | None = None
    metrics: Mapping[str, str] = field(default_factory=dict, hash=False)
    token_by_token: bool = False
    loses_ids: bool = False


def _openai_body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": request.max_new_tokens,
        "temperature": 0,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | ({"logprobs": request.logprobs} if request.logprobs else {})


def _openai_piece(event: Mapping[str, Any], before: int) -> Piece:
    choice = (event.get("choices") or [{}])[0]
    usage = event.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return Piece(
        text=choice.get("text") or "",
        count=usage.get("completion_tokens"),
        cached=details.get("cached_tokens"),
        model=event.get("model"),
        finished=choice.get("finish_reason") or "",
    )


def _vllm_body(request: Request) -> dict[str, Any]:
    # Log-probabilities are keyed by token id and not by text, because several tokens may share a text.
    by_id = {"return_tokens_as_token_ids": True} if request.logprobs else {}
    return _openai_body(request) | {"ignore_eos": True, "return_token_ids": True} | by_id


def _vllm_piece(event: Mapping[str, Any], before: int) -> Piece:
    choice = (event.get("choices") or [{}])[0]
    logprobs = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return replace(
        _openai_piece(event, before),
        tokens=choice.get("token_ids"),
        speculation=_vllm_speculation((event.get("metrics") or {}).get("speculative_decoding")),
        logprobs=[{int(name.partition(":")[2]): value for name, value in one.items()} for one in logprobs],
    )


def _vllm_speculation(metrics: Mapping[str, Any] | None) -> Speculation | None:
    """Return the report in a request's metrics. Servers with --per-request-spec-decode-metrics send them."""
    if metrics is None:
        return None
    return Speculation(
        drafts=metrics["num_spec_steps"],
        drafted=metrics["num_draft_tokens"],
        accepted=metrics["num_accepted_draft_tokens"],
        by_position=_by_position(metrics["acceptance_histogram"]),
    )


def _by_position(steps: Sequence[int]) -> list[float]:
    """Return the number of proposals kept at each position, from numbers of steps by accepted length."""
    return [sum(steps[kept:]) for kept in range(1, len(steps))]


def _sglang_body(request: Request) -> dict[str, Any]:
    prompt = {"text": request.prompt} if isinstance(request.prompt, str) else {"input_ids": list(request.prompt)}
    logprobs = {"return_logprob": True, "top_logprobs_num": request.logprobs} if request.logprobs else {}
    limits = {"temperature": 0, "max_new_tokens": request.max_new_tokens, "ignore_eos": True}
    return {**prompt, "sampling_params": limits, "stream": True, **logprobs}


def _sglang_piece(event: Mapping[str, Any], before: int) -> Piece:
    about, ids = event.get("meta_info") or {}, event.get("output_ids") or []
    count = about.get("completion_tokens")
    # Depending on the server's options, each event has the whole output or only the new tokens.
    new = slice(before, None) if count == len(ids) else slice(None)
    verified = about.get("spec_verify_ct")
    return Piece(
        tokens=ids[new],
        count=count,
        cached=about.get("cached_tokens"),
        finished=(about.get("finish_reason") or {}).get("type") or "",
        speculation=None
        if verified is None
        else Speculation(
            drafts=verified,
            drafted=about.get("spec_num_proposed_drafts"),
            accepted=about.get("spec_num_correct_drafts"),
            by_position=_by_position(about.get("spec_correct_drafts_histogram") or []),
        ),
        logprobs=[{token: value for value, token, *_ in one} for one in (about.get("output_top_logprobs") or [])[new]],
    )


def _llama_body(request: Request) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "n_predict": request.max_new_tokens,
        "temperature": 0,
        "seed": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
        "stream": True,
    } | ({"n_probs": request.logprobs} if request.logprobs else {})


def _llama_piece(event: Mapping[str, Any], before: int) -> Piece:
    timings = event.get("timings") or {}
    probabilities = event.get("completion_probabilities") or []
    return Piece(
        tokens=event.get("tokens"),
        text=event.get("content") or "",
        count=event.get("tokens_predicted") if event.get("stop") else None,
        cached=timings.get("cache_n"),
        model=event.get("model"),
        finished=str(event.get("stop_type") or "stop") if event.get("stop") else "",
        # Without drafts, the keys of drafts are missing.
        speculation=Speculation(drafted=timings.get("draft_n", 0), accepted=timings.get("draft_n_accepted", 0))
        if timings
        else None,
        logprobs=[{top["id"]: top["logprob"] for top in one.get("top_logprobs") or []} for one in probabilities],
    )


_VLLM_METRICS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
    "generated": "vllm:generation_tokens",
    "cached": "vllm:prefix_cache_hits",
}

ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", "/v1/completions", _vllm_body, _vllm_piece, ("/version", "version"), _VLLM_METRICS),
        Engine("sglang", "/generate", _sglang_body, _sglang_piece, ("/server_info", "version")),
        Engine(
            "llama.cpp",
            "/completion",
            _llama_body,
            _llama_piece,
            ("/props", "build_info"),
            token_by_token=True,
            loses_ids=True,
        ),
        Engine("openai", "/v1/completions", _openai_body, _openai_piece),
    )
}
"""The engines by name. "openai" is any server that has only the OpenAI protocol."""

MODELS_PATH = "/v1/models"
"""The path at which every engine lists its models."""

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
"""The engine's name by the owner of its models at `MODELS_PATH`."""
