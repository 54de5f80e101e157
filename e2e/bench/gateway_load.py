"""The clients of the gateway's benchmark: keep-alive connections that ask again as soon as they are answered.

In flow a port and what to ask; out flow counts and times. One process, one loop: the proxy that is measured has a core
to itself, where there are two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import cast

import httptools

from e2e.bench.gateway_engine import MODEL, STAMP, STAMP_DIGITS, Pace

KEY = "bench-key"
"""API key of every client."""
_DEADLINE_S = 90.0
_STALLED_RECEIVE_BYTES = 16 * 1024


class LoadError(Exception):
    """What was measured did not answer as it should."""


def chat(port: int, pace: Pace | None = None, *, prompt_bytes: int = 250) -> bytes:
    """A request: plain, or a stream that goes at a pace."""
    messages = [{"role": "user", "content": ("benchmark " * (prompt_bytes // 10 + 1))[:prompt_bytes]}]
    document = {"model": MODEL, "messages": messages, "max_tokens": 256, "stream": pace is not None}
    if pace is not None:
        document["user"] = pace.text()
    body = json.dumps(document).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\naccept: application/json\r\nuser-agent: bench\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, request: bytes, *, stamped: bool = False) -> None:
        """`stamped`: tokens say when they were made, and the last one of each read is believed."""
        self._request = request
        self._stamped = stamped
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._newlines = 0
        self._last = b""
        self.latencies_ms: list[float] = []
        """From the making of a token to its arrival."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(LoadError(f"the connection was lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._stamped:
            stamp = self._last[self._last.rfind(STAMP) + 1 :][:STAMP_DIGITS]
            # A chunk of the body may end within a stamp.
            if len(stamp) == STAMP_DIGITS and stamp.isdigit():
                self.latencies_ms.append((time.monotonic_ns() - int(stamp)) * 1e-6)

    def on_body(self, body: bytes) -> None:
        # Two end an event, in JSON there are none, and a read may come between the two.
        self._newlines += body.count(b"\n")
        self._last = body

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

    def begin(self) -> asyncio.Future[None]:
        """Sends the request; the result comes with the end of the answer, or LoadError."""
        if self._transport is None:
            raise LoadError("not connected")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        return self._answer

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.abort()


@contextlib.asynccontextmanager
async def _clients(port: int, count: int, request: bytes, *, stamped: bool = False) -> AsyncIterator[list[Client]]:
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    try:
        async with asyncio.timeout(_DEADLINE_S):
            for _ in range(count):
                _, client = await loop.create_connection(lambda: Client(request, stamped=stamped), "127.0.0.1", port)
                clients.append(client)
            yield clients
    finally:
        for client in clients:
            client.close()


async def latencies_us(port: int, requests: int) -> list[float]:
    """Time of each of `requests` plain requests, one after the other on one connection, in microseconds."""
    taken: list[float] = []
    async with _clients(port, 1, chat(port)) as [client]:
        for _ in range(requests):
            begun = time.perf_counter()
            await client.begin()
            taken.append((time.perf_counter() - begun) * 1e6)
    return taken


async def closed_loop(port: int, request: bytes, connections: int, seconds: float) -> int:
    """Requests answered within a time."""
    end = time.perf_counter() + seconds

    async def loop(client: Client) -> int:
        answered = 0
        while time.perf_counter() < end:
            await client.begin()
            answered += 1
        return answered

    async with _clients(port, connections, request) as clients:
        return sum(await asyncio.gather(*map(loop, clients)))


async def streams(port: int, count: int, pace: Pace) -> list[float]:
    """`count` streams at once, each asked for once. How long stamped tokens were on their way, in milliseconds.

    Raises LoadError where tokens are missing.
    """
    async with _clients(port, count, chat(port, pace), stamped=pace.stamped) as clients:
        await asyncio.gather(*(client.begin() for client in clients))
        for client in clients:
            # [DONE] is the last one.
            if client.events != pace.tokens + 1:
                raise LoadError(f"a stream had {client.events - 1} of {pace.tokens} tokens")
        return [latency for client in clients for latency in client.latencies_ms]


@contextlib.asynccontextmanager
async def open_streams(port: int, count: int, pace: Pace, prompt_bytes: int) -> AsyncIterator[None]:
    """`count` streams that have got all their tokens and stay open while the context lasts."""
    async with _clients(port, count, chat(port, pace, prompt_bytes=prompt_bytes)) as clients:
        answers = [client.begin() for client in clients]
        while min(client.events for client in clients) < pace.tokens:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        yield
        for answer in answers:
            answer.cancel()


@contextlib.contextmanager
def stalled_clients(port: int, count: int, pace: Pace) -> Iterator[None]:
    """Clients that have asked for a stream and read nothing of it while the context lasts."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _STALLED_RECEIVE_BYTES)
            client.connect(("127.0.0.1", port))
            client.sendall(chat(port, pace))
        yield
