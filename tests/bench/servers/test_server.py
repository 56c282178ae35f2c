"""Requests to a server: the outputs read from it, and the messages about its faults."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from specdecode.bench.servers.client import Client, _check, _read
from specdecode.bench.servers.engines import ENGINES, Request, Response
from specdecode.bench.servers.errors import ServerError
from specdecode.bench.servers.server import Server
from specdecode.bench.servers.spec import ServerSpec
from specdecode.models.chat import Codec
from tests.helpers.fake_server import FAULTS, Engine, next_token, options_of, serve, text_of

PROMPT = [7, 1, 3, 5, 2, 8]

Start = Callable[..., Server]


@pytest.fixture
def engines() -> list[Engine]:
    """Return the engines that `start` has started, in order."""
    return []


@pytest.fixture
def start(tmp_path: Path, engines: list[Engine]) -> Iterator[Start]:
    """Return a function that starts a fake engine in a thread, by its options, and connects to it."""
    running: list[tuple[Any, Server]] = []

    def start(*options: str, **keys: Any) -> Server:
        fake, port = serve(options_of(options))
        engines.append(fake.RequestHandlerClass.engine)
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        spec = ServerSpec(url=f"http://127.0.0.1:{port}/v1", **keys)
        running.append((fake, Server(spec, {}, Codec(None), tmp_path / "server.log")))
        return running[-1][1]

    yield start
    for fake, server in running:
        server.close()
        fake.shutdown()
        fake.server_close()


def written(prompt: list[int], length: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + length:
        text.append(next_token(text))
    return text[len(prompt) :]


def failure(server: Server, **keys: Any) -> str:
    """Return the message about a server that fails."""
    with pytest.raises(ServerError) as raised:
        server.generate([PROMPT], keys.get("length", 12), 1, keys.get("limit_s", 30))
    return str(raised.value)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_tokens_are_taken_as_ids_from_each_engine(start: Start, engine: str) -> None:
    """Guards against reading the event fields of another engine."""
    server = start("--engine", engine, "--k", "3")
    load = server.generate([PROMPT], 20, 1, 30)
    (response,) = load.responses
    assert load.outputs == [written(PROMPT, 20)]
    assert sum(response.sizes) == 20
    assert max(response.sizes) == 4
    assert response.times == sorted(response.times)
    assert 0 < response.times[0] < response.times[-1] <= load.total_s
    assert server.about == f"{engine} 1.2.3 with m"


def test_text_is_taken_where_there_are_no_ids(start: Start) -> None:
    """Guards against an engine that sends only text and is treated as sending nothing."""
    server = start("--engine", "openai", prompt="text")
    load = server.generate([PROMPT], 12, 1, 30)
    assert bytes(load.outputs[0]).decode() == text_of(written(PROMPT, 12))
    assert server.about == "openai with m"


def test_acceptance_is_what_the_engine_counts(start: Start) -> None:
    """Guards against counters that include earlier requests or the warm-up."""
    server = start("--k", "3")
    for _ in range(2):
        told = server.generate([PROMPT], 21, 1, 30).speculation
        assert told is not None
        # One token, then alternately four and one: 1 + 4 x (4 + 1).
        assert (told.drafts, told.drafted, told.accepted) == (8, 24, 12)
        assert told.by_position == [4, 4, 4]
    llama = start("--k", "3", "--engine", "llama.cpp").generate([PROMPT], 21, 1, 30).speculation
    assert llama is not None
    assert (llama.drafted, llama.accepted) == (24, 12)
    assert start("--engine", "openai", prompt="text").generate([PROMPT], 21, 1, 30).speculation is None


def test_a_closed_loop_keeps_so_many_requests_on_the_way(start: Start, engines: list[Engine]) -> None:
    """Guards against requests that are sent all at once, or one by one."""
    server, prompts = start("--step-s", "0.005"), [PROMPT[place:] for place in range(4)]
    for concurrency in (1, 2, 4):
        engines[0].most_active = 0
        load = server.generate(prompts, 12, concurrency, 30)
        assert load.outputs == [written(prompt, 12) for prompt in prompts]
        assert engines[0].most_active == concurrency


def test_no_request_waits_for_another_s_connection() -> None:
    """Guards against a concurrency of 160 of which 100 are sent, and times that include the wait."""
    client = Client("http://127.0.0.1:9")
    pool = client._client._transport._pool
    assert pool._max_connections == pool._max_keepalive_connections == sys.maxsize
    client.close()


def test_ids_that_an_engine_leaves_out_are_those_of_the_text() -> None:
    """Guards against llama.cpp that fails at each character of two tokens: it sends no ids for the first."""
    events = [
        {"content": "a", "tokens": [5]},
        {"content": "é", "tokens": [], "stop": True, "stop_type": "limit", "tokens_predicted": 3},
    ]
    for name, left in (("llama.cpp", []), ("vllm", None)):
        response = Response()
        for event in events:
            response.add(ENGINES["llama.cpp"].piece(event, len(response.tokens)), 0.1)
        assert response.sizes == [1, 1]
        if left is None:
            with pytest.raises(ServerError, match="its server counts 3 tokens, and sends 1"):
                _check(ENGINES[name], Request([1], 3, "m"), response)
        else:
            _check(ENGINES[name], Request([1], 3, "m"), response)
            assert (response.tokens, response.text) == (left, "aé")


def test_a_single_token_may_have_no_text() -> None:
    """Guards against a probe of one token that fails, because the token ends the text or is half a character."""
    response = Response()
    event = {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    response.add(ENGINES["openai"].piece(event, 0), 0.1)
    _check(ENGINES["openai"], Request([1], 1, "m"), response)
    assert (response.sizes, response.times) == ([1], [0.1])


def test_events_without_data_are_no_fault() -> None:
    """Guards against a proxy's `retry:` that fails an arm."""

    async def events() -> AsyncIterator[Any]:
        for data in ("", '{"error": null, "n": 1}', "[DONE]"):
            yield SimpleNamespace(data=data)

    async def read() -> list[Any]:
        return [content async for content in _read(events())]  # type: ignore[arg-type]

    assert asyncio.run(read()) == [{"error": None, "n": 1}]


def test_a_proxy_that_cannot_be_used_fails_its_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback, or an end of the session, because of a variable in the environment."""
    monkeypatch.setenv("HTTP_PROXY", "foo://x")
    server = Server(ServerSpec(url="http://10.0.0.7/v1"), {}, Codec(None), Path("none.log"))
    assert failure(server).startswith("no connection to its server can be made: ")


SAID = {
    "400": "its server answers with 400: the prompt is too long",
    "500": "its server answers with 500: EngineCore encountered an issue",
    "error in the stream": "its server reports an error in its stream: EngineCore encountered an issue",
    "truncates": "its server's stream ends early, after 1 of 12 tokens",
    "stops early": "its server ends after 4 of 12 tokens (stop)",
    "too many": "its server sends 13 tokens, and was asked for 12",
    "repeats a chunk": "its server counts 12 tokens, and sends 23",
    "miscounts": "its server counts 9 tokens, and sends 12",
    "another model": "its server answers as another, and was asked for m",
    "another user": "its server has generated 19 tokens meanwhile, and was asked for 12 here: somebody else uses it",
    "no stream": "its server does not stream its answer",
    "no json": "its server streams an event that is no JSON object: '{half'",
    "another format": "its server's answer is not in its engine's format (KeyError(0))",
    "empty": "its server sends an empty output",
    "breaks": "its server breaks the connection after 0 tokens (RemoteProtocolError)",
    "no counters": "its server's counters cannot be read: ",
    "hangs": "its server takes longer than 1 s, its limit_s: set a larger one",
}
HERE = {"die", "never ready", "ends at once", "fails"}  # faults of the process: see test_process.py
CACHES = {"caches", "caches in silence"}
HARMLESS = {"wrong tokens", "tie"}


def test_each_fault_is_planted_somewhere() -> None:
    """Guards against a fault of the fake server that no test plants."""
    assert SAID.keys() | HERE | CACHES | HARMLESS == set(FAULTS)


def test_text_that_is_not_what_is_counted_is_told(start: Start) -> None:
    """Guards against a wrong speed because a server miscounts its tokens."""
    server = start("--engine", "openai", "--fault", "miscounts", prompt="text", prefix_cache=True)
    assert failure(server, length=8) == "its server counts 5 tokens, and the text that it sends has 8"


@pytest.mark.parametrize("fault", SAID)
def test_a_fault_is_told_in_one_sentence(start: Start, fault: str) -> None:
    """Guards against a time for a broken output, and against a traceback."""
    # The first requests detect caching and warm the server up.
    server = start("--fault", fault, "--after", "3")
    said = failure(server, limit_s=1 if fault == "hangs" else 30)
    assert said == SAID[fault] or (fault == "no counters" and said.startswith(SAID[fault]))


def test_a_server_that_keeps_prompts_is_found_out(start: Start) -> None:
    """Guards against times without the prefill because the server caches prompts."""
    for fault, reading, engine in (("caches", "0", "vllm"), ("caches in silence", "0.001", "openai")):
        said = failure(start("--fault", fault, "--read-s", reading, "--engine", engine))
        assert said.startswith("its server caches earlier prompts")
        allowed = start("--fault", fault, "--read-s", reading, "--engine", engine, prefix_cache=True)
        assert allowed.generate([PROMPT], 4, 1, 30).outputs
    assert start("--read-s", "0.001", "--engine", "openai").generate([PROMPT], 4, 1, 30).outputs


def test_times_that_scatter_are_no_cache(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a fast server that is refused by chance, since other work disturbed some of its requests."""
    random = Random(0)
    server = start("--engine", "openai")
    asked = []

    def complete(self: Server, prompts: Any, *_: Any) -> Any:
        asked.append(prompts)
        return [SimpleNamespace(times=[0.001 * random.lognormvariate(0, 0.35)], cached=None)], None

    monkeypatch.setattr(Server, "_complete", complete)
    for _ in range(200):
        server._check_prefix_cache(PROMPT, 30)
    assert len(asked) == 200 * 12


def test_a_server_that_is_slow_at_first_is_warmed_up(start: Start, engines: list[Engine]) -> None:
    """Guards against a first time that includes the server's start."""
    server = start(prefix_cache=True)
    for prompt, requests in ((PROMPT, 2), (PROMPT, 3), (PROMPT[1:], 5)):
        server.generate([prompt], 4, 1, 30)
        assert engines[0].requests == requests  # one more before the first of a length


def test_a_server_that_is_not_there_is_told() -> None:
    """Guards against a traceback of the client, and against a message without the address."""
    server = Server(ServerSpec(url="http://127.0.0.1:9/v1"), {}, Codec(None), Path("none.log"))
    said = failure(server)
    assert said.startswith("nothing answers at http://127.0.0.1:9 (")
    assert said.endswith("): does its server run?")


def test_a_version_that_is_not_told_is_left_out(start: Start) -> None:
    """Guards against an engine that cannot be measured because it reports no version."""
    server = start("--secretive")
    server.open()
    assert server.about == "vllm with m"


def test_the_model_is_the_one_that_is_named(start: Start) -> None:
    """Guards against measuring the first model that a server lists instead of the named one."""
    assert start("--models", "a", "b", model="a").generate([PROMPT], 4, 1, 30).outputs
    assert failure(start("--models", "a", "b")) == "its server has 2 models: name one with server.model"
    assert failure(start(model="x")) == "its server has no model x: it has m"


def test_log_probabilities_are_by_id(start: Start) -> None:
    """Guards against log-probabilities of the wrong token, or of none."""
    for engine in ("vllm", "sglang", "llama.cpp"):
        response = start("--engine", engine, "--near").logprobs(PROMPT, 5, 30)
        token, nearest = written(PROMPT, 5)[4], (written(PROMPT, 5)[4] + 1) % 100
        assert len(response.logprobs) == 5
        assert response.logprobs[4] == {token: -0.5, nearest: pytest.approx(-0.51)}


def test_nothing_waits_for_a_proxy(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against requests to this machine that go through a proxy."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    began = time.monotonic()
    assert start().generate([PROMPT], 4, 1, 30).outputs == [written(PROMPT, 4)]
    assert time.monotonic() - began < 20
