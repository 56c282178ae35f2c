"""A serving engine that decodes prompts: its start, its requests and its counters."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from specdecode.bench.servers.engines import ENGINES, MODELS_PATH, OWNERS, Request, Response, Speculation
from specdecode.bench.servers.errors import ServerError
from specdecode.bench.servers.spec import ServerSpec
from specdecode.models.chat import Codec

if TYPE_CHECKING:  # these need packages of the extra "servers"
    from specdecode.bench.servers.client import Client
    from specdecode.bench.servers.metrics import Counted
    from specdecode.bench.servers.process import ServerProcess

_LOGPROBS = 5
"""Number of log-probabilities to request at each position."""

_PROBE_TOKENS = 256
"""Length of the prompt that shows whether a server caches prompts: longer than the blocks of caches."""

_PROBES = 5
_REREAD = 0.5
"""A repeated prompt from a cache takes less than this share of the time of a new prompt."""

_WARM_TOKENS = 8
"""Length of the outputs that warm a server up for prompts of some lengths."""

_SPELLING = 0.1
"""The share by which the number of tokens of a text may differ from the number of generated tokens."""

_DYING_S = 1.5
"""Most seconds from a broken connection to the end of the server."""

_SETTLE_S = 2.0
"""Most seconds by which counters may lag behind the outputs."""


@dataclass(frozen=True, slots=True)
class Load:
    """A server's answers to requests that were sent together.

    Attributes:
        responses: the responses, in the order of the requests.
        outputs: token ids of each response.
        total_s: seconds of all requests together.
        steps: number of target forwards that committed tokens, as far as known.
        speculation: the engine's report on its speculation in all requests together.
    """

    responses: Sequence[Response]
    outputs: Sequence[list[int]]
    total_s: float
    steps: float
    speculation: Speculation | None


class Server:
    """A server of a session. It is started or reached when it is first needed.

    Args:
        spec: how to reach or start it.
        values: values of the placeholders in its command, except the port.
        codec: codec of the target's tokenizer.
        log: file for the output of a started server.
        make_room: function to call before the server starts.

    Attributes:
        about: the engine, its version and the model; "" before the server has been reached.
    """

    def __init__(
        self,
        spec: ServerSpec,
        values: Mapping[str, str],
        codec: Codec,
        log: Path,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.about = ""
        self._values, self._codec, self._log, self._make_room = values, codec, log, make_room
        self._process: ServerProcess | None = None
        self._client: Client | None = None
        self._engine = ENGINES["openai"]
        self._model = spec.model or ""
        self._warm: set[tuple[int, ...]] = set()
        self._checked = False
        self._context: int = sys.maxsize

    @property
    def is_open(self) -> bool:
        """Whether it has been started or reached."""
        return self._client is not None

    @property
    def pids(self) -> Collection[int]:
        """The ids of the server's processes on this machine that this process has not started."""
        if self.spec.url is None or not self.spec.loopback:
            return ()
        from specdecode.bench.servers.process import listeners

        address = urlsplit(self.spec.url)
        return listeners(address.port or (443 if address.scheme == "https" else 80))

    def open(self) -> None:
        """Start the server, or connect to it, and find out its engine and model.

        Raises:
            ServerError: the server does not get ready, or gives an invalid answer.
        """
        if self.is_open:
            return
        try:
            from specdecode.bench.servers.client import Client
            from specdecode.bench.servers.process import ServerProcess, free_port, words_of
        except ImportError as error:
            raise ServerError(
                f"a server needs the package {error.name}, which is not installed: pip install 'specdecode[servers]'"
            ) from error
        self._make_room()
        spec, port = self.spec, free_port()
        if spec.command is not None:
            words = words_of(spec.command, {**self._values, "port": port})
            self._process = ServerProcess(words, spec.environment, self._log)
        try:
            self._client = Client(spec.base_url(port), spec.key, proxies=not spec.loopback)
            if self._process is not None:
                self._process.wait(lambda: self._connection.answers(spec.ready), spec.start_minutes)
            self._look()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections, and stop the server if it was started here."""
        client, process = self._client, self._process
        self._client = self._process = None
        self._warm.clear()
        try:
            if client is not None:
                client.close()
        finally:
            if process is not None:
                process.stop()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, concurrency: int, limit_s: float) -> Load:
        """Decode prompts, `concurrency` at a time. Prompts of new lengths are first decoded briefly, as a warm-up.

        Args:
            prompts: token ids, in order.
            max_new_tokens: tokens of each output.
            concurrency: number of prompts that are decoded together.
            limit_s: most seconds that all prompts together may take.

        Raises:
            ServerError: the server fails to decode them.
        """
        self.open()
        if not self._checked:
            self._check_prefix_cache(prompts[0], limit_s)
            self._checked = True
        shapes = (concurrency, *map(len, prompts))
        if shapes not in self._warm:
            self._complete(prompts, min(max_new_tokens, _WARM_TOKENS), concurrency, limit_s)
            self._warm.add(shapes)
        before = self._counted()
        responses, total_s = self._complete(prompts, max_new_tokens, concurrency, limit_s)
        outputs = [self._tokens(response) for response in responses]
        speculation = _sum_of([response.speculation for response in responses])
        if before is not None:
            counted = self._counted_since(before, sum(map(len, outputs)))
            speculation = counted.speculation() if speculation is None else speculation
        steps = self._steps(responses, outputs, speculation or Speculation())
        return Load(responses, outputs, total_s, steps, speculation)

    def logprobs(self, prompt: Sequence[int], length: int, limit_s: float) -> Response:
        """Decode a prompt with the log-probabilities of the likeliest tokens, if the server sends them.

        Raises:
            ServerError: the server fails to decode it.
        """
        self.open()
        responses, _ = self._ask([self._request(prompt, length, _LOGPROBS)], 1, limit_s)
        return responses[0]

    @property
    def _connection(self) -> Client:
        assert self._client is not None
        return self._client

    def _look(self) -> None:
        """Find out the model, the engine and its version."""
        spec = self.spec
        try:
            models = {str(one["id"]): one for one in json.loads(self._connection.get(MODELS_PATH))["data"]}
        except (KeyError, TypeError, ValueError):
            raise ServerError(f"its server does not list its models at {MODELS_PATH} in OpenAI's format") from None
        if spec.model is None and len(models) != 1:
            raise ServerError(f"its server has {len(models)} models: name one with server.model")
        self._model = spec.model or next(iter(models))
        if self._model not in models:
            raise ServerError(f"its server has no model {self._model}: it has {', '.join(models) or 'none'}")
        context = models[self._model].get("max_model_len")  # of vLLM and SGLang
        self._context = context if isinstance(context, int) else self._context
        owner = str(models[self._model].get("owned_by", ""))
        self._engine = ENGINES[spec.engine or OWNERS.get(owner, "openai")]
        self.about = " ".join(filter(None, [self._engine.name, self._version(), f"with {self._model}"]))

    def _version(self) -> str:
        if self._engine.version is None:
            return ""
        path, key = self._engine.version
        try:
            return str(json.loads(self._connection.get(path))[key])
        except (ServerError, KeyError, TypeError, ValueError):
            return ""  # the version is only reported

    def _tokens(self, response: Response) -> list[int]:
        """Return the token ids of a response: the ids that were sent, or the ids of its text.

        Raises:
            ServerError: the server counts a very different number of tokens.
        """
        if response.tokens:
            return response.tokens
        tokens = self._codec.encode(response.text)
        # The encoded text may have other tokens than the generated ones, but their numbers must be close.
        if response.count is not None and abs(len(tokens) - response.count) > 2 + _SPELLING * response.count:
            raise ServerError(
                f"its server counts {response.count} tokens, and the text that it sends has {len(tokens)}"
            )
        return tokens

    def _steps(self, responses: Sequence[Response], outputs: Sequence[list[int]], speculation: Speculation) -> float:
        """Return the number of target forwards that committed tokens: the largest lower bound from the known counts.

        The prompt's forward gives one token, and each further forward one token more than it accepts proposals. Engines
        also count accepted proposals that are cut off at the end, so there may have been more forwards. One event may
        bring the tokens of several steps, so there were at least as many forwards as events.
        """
        steps = 0.0 if self._engine.token_by_token else float(sum(len(response.sizes) for response in responses))
        if speculation.accepted is not None:
            steps = max(steps, sum(map(len, outputs)) - speculation.accepted)
        return max(steps, len(responses) + (speculation.drafts or 0.0))

    def _request(self, ids: Sequence[int], max_new_tokens: int, logprobs: int = 0) -> Request:
        prompt = list(ids) if self.spec.prompt == "ids" else self._codec.decode(ids)
        return Request(prompt, max_new_tokens, self._model, logprobs, self.spec.request)

    def _complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, concurrency: int, limit_s: float
    ) -> tuple[list[Response], float]:
        requests = [self._request(prompt, max_new_tokens) for prompt in prompts]
        return self._ask(requests, concurrency, limit_s)

    def _ask(self, requests: Sequence[Request], concurrency: int, limit_s: float) -> tuple[list[Response], float]:
        try:
            return self._connection.complete(self._engine, requests, concurrency, limit_s)
        except ServerError:
            if self._process is not None:
                self._process.check(_DYING_S)  # the end of the server explains more
            raise

    def _counted(self) -> Counted | None:
        """Return the engine's counters; None if it has none."""
        if not self._engine.metrics:
            return None
        from specdecode.bench.servers.metrics import counted

        try:
            return counted(self._connection.get("/metrics"), self._engine.metrics)
        except ValueError as error:
            raise ServerError(f"its server's counters cannot be read: {error}") from error

    def _counted_since(self, before: Counted, sent: int) -> Counted:
        """Return the engine's counts for `sent` tokens. Raise ServerError if it generated another number of tokens."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            now = self._counted()
            assert now is not None
            since = now.since(before)
            if since.generated >= sent or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if since.generated > sent:
            raise ServerError(
                f"its server has generated {since.generated:g} tokens meanwhile, and was asked for {sent} here:"
                " somebody else uses it"
            )
        if since.generated < sent:
            raise ServerError(f"its server counts {since.generated:g} tokens at /metrics, and has sent {sent}")
        return since

    def _check_prefix_cache(self, prompt: Sequence[int], limit_s: float) -> None:
        """Raise ServerError if the server takes the KV of a repeated prompt from a cache."""
        if self.spec.prefix_cache:
            return
        least = min(_PROBE_TOKENS, self._context - 1)
        text = (list(prompt) * (1 + least // len(prompt)))[: max(len(prompt), least)]

        def first_token(ids: Sequence[int]) -> tuple[float, float | None]:
            before = self._counted()
            (response,), _ = self._complete([ids], 1, 1, limit_s)
            cached: float | None = response.cached
            if before is not None:
                cached = self._counted_since(before, 1).cached
            return response.times[0], cached

        first_token(text)
        _, cached = first_token(text)
        if cached is None:
            # Compare the times of the same prompt with the times of other prompts of equal length. They take turns,
            # and all pairs but one must agree: where reading takes no time, other work makes any pair differ by chance.
            others = [[*text[place:], *text[:place]] for place in range(1, 1 + _PROBES)]
            faster = sum(first_token(text)[0] < _REREAD * first_token(other)[0] for other in others)
            kept = faster >= _PROBES - 1
        else:
            kept = cached > 0
        if kept:
            raise ServerError(
                "its server caches earlier prompts, so times would leave out the prefill: turn that off (vLLM:"
                " --no-enable-prefix-caching, SGLang: --disable-radix-cache), or set server.prefix_cache = true"
            )


def _sum_of(reports: Sequence[Speculation | None]) -> Speculation | None:
    """Sum an engine's reports on several outputs; None if one has no report."""
    known = [report for report in reports if report is not None]
    if not known or len(known) < len(reports):
        return None

    by_position = [sum(column) for column in zip_longest(*(one.by_position for one in known), fillvalue=0.0)]
    columns = {name: [getattr(one, name) for one in known] for name in ("drafts", "drafted", "accepted")}
    sums = {name: None if None in column else sum(column) for name, column in columns.items()}
    return Speculation(**sums, by_position=by_position)


class Servers:
    """The servers of a session. Arms with equal tables share a server.

    Args:
        values: values of the placeholders in commands, except the port.
        codec: codec of the target's tokenizer.
        logs: folder for the output of servers.
    """

    def __init__(self, values: Mapping[str, str], codec: Codec, logs: Path) -> None:
        self._values, self._codec, self._logs = values, codec, logs
        self._servers: dict[str, Server] = {}

    def server(self, arm: str, spec: ServerSpec) -> Server:
        """Return the server of an arm.

        Raises:
            ValueError: its command names a draft, but there is none.
        """
        if "{draft}" in (spec.command or "") and not self._values["draft"]:
            raise ValueError(f"arm {arm!r}: server.command names {{draft}}: name the model with --draft")
        key = repr(spec)
        if key not in self._servers:

            def make_room() -> None:
                for other in self._servers.values():
                    if spec.alone and other.spec.alone:
                        other.close()

            self._servers[key] = Server(spec, self._values, self._codec, self._logs / f"{arm}.log", make_room)
        return self._servers[key]
