"""A mock engine for the gateway's benchmark: answers at once, or streams one token every 20 ms.

It does what an engine does on the wire and nothing else: one event, one chunk, one write, as uvicorn behind vLLM
sends them; the usage when asked; keep-alive. Run as a program it prints its port and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import httptools
import uvloop

TOKENS = 250
INTERVAL_S = 0.02
MODEL = "bench"

_BASE = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "created": 1700000000, "model": MODEL}
_USAGE = {"prompt_tokens": 64, "completion_tokens": TOKENS, "total_tokens": 64 + TOKENS}


def _response(document: Any) -> bytes:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _event(document: Any) -> bytes:
    text = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def _delta(index: int) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": f" word{index}"}, "logprobs": None, "finish_reason": None}
    return _BASE | {"object": "chat.completion.chunk", "choices": [choice]}


_ANSWER = _response(
    _BASE
    | {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "a short answer " * 8}, "finish_reason": "stop"}
        ],
        "usage": _USAGE,
    }
)
_MODELS = _response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "bench"}]})
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_EVENTS = [_event(_delta(index)) for index in range(TOKENS)]
_USAGE_EVENT = _event(_BASE | {"object": "chat.completion.chunk", "choices": [], "usage": _USAGE})
_END = _event("[DONE]") + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        if self._parser.get_method() == b"GET":
            self._transport.write(_MODELS)
        elif b'"stream":true' in body or b'"stream": true' in body:
            self._transport.write(_STREAM_HEAD)
            self._with_usage = b"include_usage" in body
            self._next(0, self._loop.time() + INTERVAL_S)
        else:
            self._transport.write(_ANSWER)

    def _next(self, index: int, due: float) -> None:
        if index == TOKENS:
            self._transport.write((_USAGE_EVENT if self._with_usage else b"") + _END)
            return
        self._transport.write(_EVENTS[index])
        self._timer = self._loop.call_at(due, self._next, index + 1, due + INTERVAL_S)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
