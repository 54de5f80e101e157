"""A mock engine for the gateway's benchmark: answers at once, or streams tokens at a given pace.

    python -m e2e.bench.gateway_engine 64     prints 64 ports, which are one engine each, and serves until it is ended

It does what an engine does on the wire and nothing else: one event, one chunk, one write, as uvicorn behind vLLM sends
them; the usage when asked; metrics; keep-alive; it stops making tokens for a client that does not read. How a stream
goes is said by the request's field `user` (`Pace`), which every proxy passes on.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import httptools
import uvloop

MODEL = "bench"
STAMP = b"@"
"""Comes before the time (`time.monotonic_ns`) at which a token was made."""
STAMP_DIGITS = 20


@dataclass(frozen=True)
class Pace:
    """How a stream goes."""

    tokens: int
    per_write: int = 1
    interval_ms: float = 0.0
    """Between writes; 0: as fast as the engine can."""
    stamped: bool = False
    """Whether each token says when it was made."""
    holds: bool = False
    """Whether the stream stays open after its last token."""

    def text(self) -> str:
        """As the request says it."""
        return json.dumps(asdict(self))


_BASE = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "created": 1700000000, "model": MODEL}
_USAGE = {"prompt_tokens": 64, "completion_tokens": 250, "total_tokens": 314}
_METRICS = f"""vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 1.0
vllm:num_requests_waiting{{engine="0",model_name="{MODEL}"}} 0.0
vllm:kv_cache_usage_perc{{engine="0",model_name="{MODEL}"}} 0.1
vllm:cache_config_info{{block_size="16",num_gpu_blocks="100000"}} 1.0
""".encode()


def _response(body: bytes, content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _event(document: Any) -> bytes:
    text = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def _delta(text: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return _BASE | {"object": "chat.completion.chunk", "choices": [choice]}


def _stamped() -> bytes:
    # As wide as the other times, so that only digits have to be put in.
    return _STAMPED.replace(b"0" * STAMP_DIGITS, b"%0*d" % (STAMP_DIGITS, time.monotonic_ns()))


_MESSAGE = {"role": "assistant", "content": "a short answer " * 8}
_CHOICES = [{"index": 0, "message": _MESSAGE, "finish_reason": "stop"}]
_ANSWER = _response(json.dumps(_BASE | {"object": "chat.completion", "choices": _CHOICES, "usage": _USAGE}).encode())
_MODELS = _response(
    json.dumps(
        {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "bench"}]}
    ).encode()
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_EVENTS = [_event(_delta(f" word{index}")) for index in range(256)]
_STAMPED = _event(_delta(f" {STAMP.decode()}{'0' * STAMP_DIGITS}"))
_USAGE_EVENT = _event(_BASE | {"object": "chat.completion.chunk", "choices": [], "usage": _USAGE})
_END = _event("[DONE]") + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._next: asyncio.Handle | None = None
        self._waits: tuple[int, float] | None = None
        self._paused = False

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()
        self._paused, self._waits = True, None

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._waits is not None:
            at, self._waits = self._waits, None
            self._write(*at)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        if self._parser.get_method() == b"GET":
            metrics = self._url == b"/metrics"
            self._transport.write(_response(_METRICS, "text/plain; version=0.0.4") if metrics else _MODELS)
            if not self._parser.should_keep_alive():
                self._transport.close()
            return
        document = json.loads(body)
        if not document.get("stream"):
            self._transport.write(_ANSWER)
            return
        self._pace = Pace(**json.loads(document["user"]))
        self._with_usage = b"include_usage" in body
        self._transport.write(_STREAM_HEAD)
        self._write(0, self._loop.time())

    def _write(self, index: int, due: float) -> None:
        if self._paused:
            self._waits = index, due
            return
        pace = self._pace
        if index >= pace.tokens:
            if not pace.holds:
                self._transport.write((_USAGE_EVENT if self._with_usage else b"") + _END)
            return
        after = min(index + pace.per_write, pace.tokens)
        if pace.stamped:
            self._transport.write(b"".join(_stamped() for _ in range(index, after)))
        else:
            self._transport.write(b"".join(_EVENTS[token % len(_EVENTS)] for token in range(index, after)))
        if pace.interval_ms:
            due += pace.interval_ms * 1e-3
            self._next = self._loop.call_at(due, self._write, after, due)
        else:
            self._next = self._loop.call_soon(self._write, after, due)


async def _serve(engines: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(_Connection, "127.0.0.1", 0, backlog=4096) for _ in range(engines)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
