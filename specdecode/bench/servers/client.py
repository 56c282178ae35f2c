"""A client that requests outputs from a server, one or several at a time, and records the times of their tokens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx2

from specdecode.bench.servers.engines import MODELS_PATH, Engine, Request, Response
from specdecode.bench.servers.errors import ServerError
from specdecode.core.errors import first_line

_SHORT_S = 10.0
"""Most seconds that an answer about the server itself may take."""

_IDLE_S = 2.0
"""Seconds that an idle connection is kept. Engines close theirs after 5; a request on a closed one would fail."""


class Client:
    """A connection to a server.

    Args:
        base_url: address of the server, without path.
        key: API key of the server, if it needs one.
        proxies: whether to use the proxies that the environment names.

    Raises:
        ServerError: the key or a proxy cannot be used.
    """

    def __init__(self, base_url: str, key: str | None = None, *, proxies: bool = False) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # No limit on connections: beyond 100 the library would let requests wait, and their times would count.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S)
        try:
            self._client = httpx2.AsyncClient(
                base_url=base_url, headers=headers, trust_env=proxies, timeout=None, limits=limits
            )
        except (ImportError, ValueError, TypeError) as error:
            raise ServerError(f"no connection to its server can be made: {first_line(error)}") from error
        self._loop = asyncio.new_event_loop()  # after what may fail: a loop must be closed

    def close(self) -> None:
        """Close all connections, also after an interrupted request."""
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._client.aclose()

    def answers(self, path: str) -> bool:
        """Return whether a path answers with success.

        Raises:
            ServerError: the server answers with 404, though it lists its models: it has no such path.
        """
        try:
            answer = self._get(path)
            missing = answer.status_code == 404 and self._get(MODELS_PATH).is_success
        except httpx2.HTTPError:
            return False
        if missing:
            raise ServerError(
                f"its server answers {path} with 404, though it lists its models: set server.ready to a path it has"
            )
        return answer.is_success

    def get(self, path: str) -> str:
        """Return the answer of a path.

        Raises:
            ServerError: there is no answer, or it is an error.
        """
        with _told_in_a_sentence():
            response = self._get(path)
        if not response.is_success:
            raise ServerError(f"its server answers {path} with {response.status_code}{_reason(response.text)}")
        return response.text

    def _get(self, path: str) -> httpx2.Response:
        return self._loop.run_until_complete(self._client.get(path, timeout=_SHORT_S))

    def complete(
        self, engine: Engine, requests: Sequence[Request], concurrency: int, limit_s: float
    ) -> tuple[list[Response], float]:
        """Send requests in a closed loop: `concurrency` at a time, and the next as soon as one is answered.

        Args:
            engine: engine with the protocol of the server.
            requests: the requests, in order.
            concurrency: number of requests in flight.
            limit_s: most seconds that all requests together may take.

        Returns:
            The responses in the order of the requests, and the seconds of all requests together.

        Raises:
            ServerError: a request has no response, or an invalid one.
        """
        return self._loop.run_until_complete(self._all(engine, requests, concurrency, limit_s))

    async def _all(
        self, engine: Engine, requests: Sequence[Request], concurrency: int, limit_s: float
    ) -> tuple[list[Response], float]:
        responses: list[Response] = [Response() for _ in requests]
        left = iter(range(len(requests)))

        async def client() -> None:
            for place in left:
                await self._one(engine, requests[place], responses[place])

        started = time.perf_counter()
        clients = [asyncio.ensure_future(client()) for _ in range(min(concurrency, len(requests)))]
        try:
            with _told_in_a_sentence(responses):
                await asyncio.wait_for(asyncio.gather(*clients), limit_s)
        except asyncio.TimeoutError:
            raise ServerError(f"its server takes longer than {limit_s:g} s, its limit_s: set a larger one") from None
        finally:
            for one in clients:
                one.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        seconds = time.perf_counter() - started
        for request, response in zip(requests, responses, strict=True):
            _check(engine, request, response)
        return responses, seconds

    async def _one(self, engine: Engine, request: Request, response: Response) -> None:
        started = time.perf_counter()
        async with self._events(engine.path, {**engine.body(request), **request.others}) as events:
            async for event in events:
                seconds = time.perf_counter() - started
                piece = engine.piece(event, len(response.tokens))
                if piece.model is not None and piece.model != request.model:
                    raise ServerError(f"its server answers as {piece.model}, and was asked for {request.model}")
                response.add(piece, seconds)

    @asynccontextmanager
    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        async with self._client.stream("POST", path, json=body) as answer:
            if not answer.is_success:
                await answer.aread()
                raise ServerError(f"its server answers with {answer.status_code}{_reason(answer.text)}")
            if "text/event-stream" not in answer.headers.get("content-type", ""):
                raise ServerError("its server does not stream its answer")
            yield _read(httpx2.EventSource(answer))


async def _read(events: httpx2.EventSource) -> AsyncIterator[dict[str, Any]]:
    async for event in events:
        if not event.data or event.data == "[DONE]":
            continue  # not all servers send the latter, and the output itself says that it has ended
        try:
            content = json.loads(event.data)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ServerError(f"its server streams an event that is no JSON object: {event.data[:80]!r}")
        if content.get("error"):
            raise ServerError(f"its server reports an error in its stream{_reason(event.data)}")
        yield content


def _check(engine: Engine, request: Request, response: Response) -> None:
    """Raise ServerError unless a response says that it has ended, and has the requested number of tokens.

    If the engine left out ids, remove the others: then those of the text are taken.
    """
    if engine.loses_ids and (response.count or 0) > len(response.tokens):
        response.tokens = []
    asked, sent = request.max_new_tokens, len(response.tokens)
    if not response.finished:
        raise ServerError(f"its server's stream ends early, after {sent or sum(response.sizes)} of {asked} tokens")
    if response.count is not None and response.tokens and response.count != sent:
        raise ServerError(f"its server counts {response.count} tokens, and sends {sent}")
    if sent > asked or (response.count or 0) > asked:
        raise ServerError(f"its server sends {max(sent, response.count or 0)} tokens, and was asked for {asked}")
    if not (response.tokens or response.text or response.count):
        raise ServerError("its server sends an empty output")
    count = sent if response.tokens else response.count
    # Not every server can continue after a stop token.
    if count is not None and count < asked and (response.tokens or response.finished != "stop"):
        raise ServerError(f"its server ends after {count} of {asked} tokens ({response.finished})")


@contextmanager
def _told_in_a_sentence(responses: Sequence[Response] = ()) -> Iterator[None]:
    """Raise ServerError in place of errors of the connection, and of answers that are not in the engine's format."""
    try:
        yield
    except httpx2.ConnectError as error:
        url = error.request.url
        address = f"{url.scheme}://{url.netloc.decode()}"
        raise ServerError(f"nothing answers at {address} ({first_line(error)}): does its server run?") from error
    except httpx2.HTTPError as error:
        known = f" after {sum(sum(response.sizes) for response in responses)} tokens" if responses else ""
        raise ServerError(f"its server breaks the connection{known} ({type(error).__name__})") from error
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ServerError(f"its server's answer is not in its engine's format ({error!r})") from error


def _reason(text: str) -> str:
    """Return a server's error message after a colon; "" without a message."""
    try:
        content = json.loads(text)
        content = content.get("error", content)
        said = content if isinstance(content, str) else content.get("message") or content.get("detail") or text
    except (ValueError, AttributeError):
        said = text
    words = " ".join(str(said).split())
    return f": {words[:200]}" if words else ""
