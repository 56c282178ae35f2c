"""A fake serving engine with the interface of a real one, and with faults on demand. It runs as a script.

`python fake_server.py --port PORT --engine vllm --k 3 --fault die ...`. The next token depends on the text so far, so
outputs are diverse. Of a request's drafts of K tokens, every second one is accepted as a whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from typing import Any

VOCABULARY = 100

FAULTS = (
    "die",  # killed in the middle of an output
    "never ready",
    "ends at once",
    "fails",  # with two errors, the second raised after the first
    "400",
    "500",
    "error in the stream",
    "truncates",  # cuts the stream without an end event
    "stops early",  # as if a stop token had ended the output
    "too many",  # one token too many
    "repeats a chunk",
    "miscounts",  # reports another number of tokens than it sends
    "another model",  # answers as another model after some requests
    "another user",  # decodes at the same time
    "wrong tokens",
    "tie",  # where the output diverges, the second token is as likely as the first
    "no stream",
    "no json",
    "another format",
    "empty",  # says that an output without tokens has its length
    "breaks",  # closes the connection without an answer
    "no counters",  # sends counters that cannot be read
    "caches",
    "caches in silence",  # is faster on a known prompt, and reports no cached tokens
    "hangs",
)


def next_token(text: Sequence[int]) -> int:
    """Return the token that follows a text."""
    return hashlib.sha256(bytes(token % 256 for token in text[-8:])).digest()[0] % VOCABULARY


def text_of(tokens: Sequence[int]) -> str:
    """Return the text of tokens, one character each."""
    return "".join(chr(32 + token % 90) for token in tokens)


class Engine:
    """The counters of the server, and the options of its decoding."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lock = threading.Lock()
        self.requests = self.drafts = self.drafted = self.accepted = self.generated = self.cached = 0
        self.by_position = [0] * options.k
        self.read: set[tuple[int, ...]] = set()
        self.active = self.most_active = 0

    def steps(self, prompt: Sequence[int], length: int) -> Iterator[list[int]]:
        """Yield the tokens of each step: one without a draft, else K + 1 and 1 alternately."""
        text, k, written = list(prompt), self.options.k, 0
        # Alternate within a request: over all requests, the result would depend on how they interleave.
        turns = cycle((k, 0))
        while written < length:
            kept = 0
            if written and k:
                kept = next(turns)
                with self.lock:
                    self.drafts += 1
                    self.drafted += k
                    self.accepted += kept
                    for at in range(kept):
                        self.by_position[at] += 1
            new = []
            for _ in range(min(kept + 1, length - written)):
                new.append(next_token(text))
                text.append(new[-1])
            written += len(new)
            yield new


class Handler(BaseHTTPRequestHandler):
    """A request handler that answers as the engine of the options does."""

    engine: Engine
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as streaming servers do

    def log_message(self, *_: Any) -> None:
        """Ignore the message: the log is for errors only."""

    def do_GET(self) -> None:
        options, engine = self.engine.options, self.engine
        if self.path == "/health" and not options.unhealthy:
            self._send(503 if options.fault == "never ready" else 200, {})
        elif self.path == "/v1/models":
            owner = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}.get(options.engine, "me")
            self._send(200, {"data": [{"id": name, "owned_by": owner} for name in options.models]})
        elif self.path in ("/version", "/server_info", "/props") and not options.secretive:
            self._send(200, {"version": "1.2.3", "build_info": "1.2.3"})
        elif self.path == "/metrics" and options.engine == "vllm":
            counts = {
                "spec_decode_num_drafts": engine.drafts,
                "spec_decode_num_draft_tokens": engine.drafted,
                "spec_decode_num_accepted_tokens": engine.accepted,
                "generation_tokens": engine.generated,
                "prefix_cache_hits": engine.cached,
            }
            lines = [f'vllm:{name}_total{{engine="0",model_name="m"}} {count}.0' for name, count in counts.items()]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{at}"}} {count}.0'
                for at, count in enumerate(engine.by_position)
            ]
            if options.fault == "no counters" and engine.requests > options.after:
                lines.append('vllm:half{engine="0')
            types = sorted({line.partition("{")[0] for line in lines})
            self._send(200, "\n".join([*(f"# TYPE {name} counter" for name in types), *lines]) + "\n")
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine, fault = self.engine, self.engine.options.fault
        with engine.lock:
            engine.requests += 1
            engine.active += 1
            engine.most_active = max(engine.most_active, engine.active)
        try:
            late = engine.requests > engine.options.after
            self._answer(body, fault if late else "")
        finally:
            with engine.lock:
                engine.active -= 1

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        engine, name = self.engine, self.engine.options.engine
        if fault == "400":
            self._send(400, {"error": {"message": "the prompt is too long", "type": "BadRequestError"}})
            return
        if fault == "500":
            self._send(500, {"error": {"message": "EngineCore encountered an issue"}})
            return
        if fault == "breaks":
            self.close_connection = True
            return
        if fault == "no stream":
            self._send(200, {"choices": [{"text": "all at once"}]})
            return
        prompt, length, logprobs = self._asked(body)
        cached = self._read(prompt, fault)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        model = "another" if fault == "another model" else engine.options.models[0]
        self._stream(name, prompt, length, logprobs, model, cached, fault)
        self.close_connection = True

    def _asked(self, body: dict[str, Any]) -> tuple[list[int], int, int]:
        sampling = body.get("sampling_params", {})
        prompt = body.get("prompt", body.get("input_ids", body.get("text")))
        ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        length = body.get("max_tokens") or body.get("n_predict") or sampling.get("max_new_tokens")
        return ids, length, body.get("logprobs") or body.get("n_probs") or body.get("top_logprobs_num") or 0

    def _read(self, prompt: list[int], fault: str) -> int:
        """Wait as long as reading a prompt takes, and return how many of its tokens were cached."""
        engine, key = self.engine, tuple(prompt)
        known = key in engine.read and engine.options.fault.startswith("caches")
        engine.read.add(key)
        time.sleep(0.0 if known else engine.options.read_s * len(prompt))
        if known and engine.options.fault == "caches":
            engine.cached += len(prompt) // 16 * 16
            return len(prompt) // 16 * 16
        return 0

    def _stream(
        self, name: str, prompt: list[int], length: int, logprobs: int, model: str, cached: int, fault: str
    ) -> None:
        engine, options, sent = self.engine, self.engine.options, 0
        before = (engine.drafts, engine.accepted, engine.drafted)
        if fault == "another user":
            engine.generated += 7
        for new in engine.steps(prompt, 0 if fault == "empty" else length + (fault == "too many")):
            time.sleep(options.step_s * (1 + options.crowd * (engine.active - 1)))
            if fault == "hangs" and sent:
                time.sleep(60)
            if fault == "die" and sent and not (options.once and os.path.exists(options.once)):
                if options.once:
                    open(options.once, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "error in the stream" and sent:
                self._event({"error": {"message": "EngineCore encountered an issue"}})
                return
            if fault == "truncates" and sent:
                return
            if fault == "no json" and sent:
                self.wfile.write(b"data: {half\n\n")
                return
            if fault == "another format" and sent:
                self._event({"choices": {"text": "a"}})
                return
            if fault in ("wrong tokens", "tie") and sent > 2:
                new = [(token + 1) % VOCABULARY for token in new]
            self._event(self._piece(name, new, prompt, sent, logprobs, model))
            if fault == "repeats a chunk" and sent:
                self._event(self._piece(name, new, prompt, sent, logprobs, model))
            sent += len(new)
            if fault == "stops early" and sent > 3:
                break
        engine.generated += sent
        count = sent - (3 if fault == "miscounts" else 0)
        drafts, accepted, drafted = (now - was for now, was in zip(_counts(engine), before, strict=True))
        self._end(
            name,
            count,
            model,
            cached,
            drafted,
            accepted,
            drafts,
            "stop" if fault in ("stops early", "miscounts") else "length",
        )

    def _piece(
        self, name: str, new: list[int], prompt: list[int], sent: int, logprobs: int, model: str
    ) -> dict[str, Any]:
        text, place, likely = text_of(new), sent, []
        for token in new:
            # Each token has a runner-up. Where outputs diverge by a tie, its probability is within rounding.
            tie = self.engine.options.fault == "tie"
            near, first = 0.01 if tie or self.engine.options.near else 2.0, -0.5
            if tie and place <= 2:
                near = 0.03
            other = token - 1 if tie and place > 2 else token + 1
            likely.append({token: first, other % VOCABULARY: first - near})
            place += 1
        if name == "sglang":
            about = {"completion_tokens": sent + len(new), "cached_tokens": 0}
            tops = [[[value, token, None] for token, value in one.items()] for one in likely] if logprobs else []
            return {"text": text, "output_ids": new, "meta_info": about | {"output_top_logprobs": tops}}
        if name == "llama.cpp":
            tops = [[{"id": token, "logprob": value} for token, value in one.items()] for one in likely]
            shown = {"completion_probabilities": [{"top_logprobs": one} for one in tops]} if logprobs else {}
            return {"content": text, "tokens": new, "stop": False, **shown}
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": None}
        if name == "vllm":
            choice["token_ids"] = new
            if logprobs:
                tops = [{f"token_id:{token}": value for token, value in one.items()} for one in likely]
                choice["logprobs"] = {"top_logprobs": tops}
        return {"model": model, "choices": [choice]}

    def _end(
        self,
        name: str,
        count: int,
        model: str,
        cached: int,
        drafted: int,
        accepted: int,
        drafts: int,
        why: str,
    ) -> None:
        if name == "sglang":
            about = {"completion_tokens": count, "cached_tokens": cached, "finish_reason": {"type": why}}
            self._event({"text": "", "output_ids": [], "meta_info": about})
        elif name == "llama.cpp":
            timings = {"draft_n": drafted, "draft_n_accepted": accepted} if self.engine.options.k else {}
            self._event({"content": "", "stop": True, "stop_type": why, "tokens_predicted": count, "timings": timings})
        else:
            self._event({"model": model, "choices": [{"index": 0, "text": "", "finish_reason": why}]})
            self._event({"model": model, "choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n")
        self.wfile.flush()

    def _send(self, code: int, content: dict[str, Any] | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


def _counts(engine: Engine) -> tuple[int, int, int]:
    return engine.drafts, engine.accepted, engine.drafted


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--engine", default="vllm", choices=("vllm", "sglang", "llama.cpp", "openai"))
    parser.add_argument("--k", type=int, default=0, help="draft length")
    parser.add_argument("--models", nargs="+", default=["m"])
    parser.add_argument("--fault", default="", choices=("", *FAULTS))
    parser.add_argument("--once", help="file that is made with the fault; where it is, there is none")
    parser.add_argument("--after", type=int, default=0, help="requests before the fault")
    parser.add_argument("--step-s", type=float, default=0.001, help="seconds a step")
    parser.add_argument("--read-s", type=float, default=0.0, help="seconds a token of the prompt")
    parser.add_argument("--crowd", type=float, default=0.0, help="share by which each other request slows a step")
    parser.add_argument("--secretive", action="store_true", help="tells no version")
    parser.add_argument("--unhealthy", action="store_true", help="has no path /health")
    parser.add_argument("--near", action="store_true", help="second tokens are nearly as likely")
    return parser.parse_args(arguments)


class Server(ThreadingHTTPServer):
    """A server whose threads end with it."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""


def serve(options: argparse.Namespace) -> tuple[socketserver.BaseServer, int]:
    """Return a listening server and its port."""
    handler = type("Handler", (Handler,), {"engine": Engine(options)})
    server = Server(("127.0.0.1", options.port), handler)
    return server, server.server_address[1]


def main() -> None:
    """Serve until the process is ended."""
    options = options_of()
    sys.stderr.write("loading\n")
    if options.fault == "ends at once":
        raise SystemExit("CUDA out of memory")
    if options.fault == "fails":
        sys.stderr.write("ValueError: memory is too small\n")
        raise RuntimeError("the engine cannot start")
    serve(options)[0].serve_forever()


if __name__ == "__main__":
    main()
