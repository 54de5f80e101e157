"""The clients of the gateway's benchmark: keep-alive connections that ask again as soon as they are answered."""

from __future__ import annotations

import asyncio
import json
import time
from typing import cast

import httptools

from e2e.bench.gateway_engine import MODEL

_DEADLINE_S = 60.0
_MESSAGES = [{"role": "user", "content": "benchmark " * 25}]


class LoadError(Exception):
    """What was measured did not answer as it should."""


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._newlines = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(LoadError(f"the connection was lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        # Two end an event, in JSON there are none, and a read may come between the two.
        self._newlines += body.count(b"\n")

    @property
    def events(self) -> int:
        """Events of streams that came."""
        return self._newlines // 2

    def on_message_complete(self) -> None:
        if self._answer is None or self._answer.done():
            return
        status = self._parser.get_status_code()
        if status == 200:
            self._answer.set_result(None)
        else:
            self._answer.set_exception(LoadError(f"answered {status}"))

    async def ask(self) -> None:
        """Sends the request and waits for the whole answer. Raises LoadError."""
        if self._transport is None:
            raise LoadError("not connected")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        await self._answer

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.abort()


def _request(port: int, stream: bool) -> bytes:
    body = json.dumps({"model": MODEL, "messages": _MESSAGES, "max_tokens": 256, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def _connect(port: int, count: int, stream: bool) -> list[Client]:
    loop = asyncio.get_running_loop()
    request = _request(port, stream)
    pairs = [await loop.create_connection(lambda: Client(request), "127.0.0.1", port) for _ in range(count)]
    return [client for _, client in pairs]


async def latencies_us(port: int, requests: int) -> list[float]:
    """Time of each of `requests` plain requests, one after the other on one connection, in microseconds."""
    [client] = await _connect(port, 1, stream=False)
    taken: list[float] = []
    try:
        async with asyncio.timeout(_DEADLINE_S):
            for _ in range(requests):
                begun = time.perf_counter()
                await client.ask()
                taken.append((time.perf_counter() - begun) * 1e6)
    finally:
        client.close()
    return taken


async def plain(port: int, connections: int, seconds: float) -> int:
    """Plain requests answered by closed-loop clients within a time."""
    clients = await _connect(port, connections, stream=False)
    end = time.perf_counter() + seconds

    async def loop(client: Client) -> int:
        answered = 0
        while time.perf_counter() < end:
            await client.ask()
            answered += 1
        return answered

    try:
        async with asyncio.timeout(_DEADLINE_S):
            return sum(await asyncio.gather(*map(loop, clients)))
    finally:
        for client in clients:
            client.close()


async def streams(port: int, count: int) -> int:
    """Events of `count` streams at once, each asked for once."""
    clients = await _connect(port, count, stream=True)
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await asyncio.gather(*(client.ask() for client in clients))
        return sum(client.events for client in clients)
    finally:
        for client in clients:
            client.close()
