"""Connections to engines: HTTP/1.1 with keep-alive, one request at a time, pooled per engine.

What one read holds is handed over in one call, already de-chunked: sixteen events that arrive together cost one
write to the client, not sixteen. That, and not the language, is what makes a proxy of token streams cheap.

A connection goes back to the pool only after the message has ended, its framing allows another, and it is being
read. An engine may close an idle connection at any time; if that is noticed before reuse the connection just
vanishes, and if not, its next owner learns from `reused` and `answered` that it may silently try again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Protocol, cast

import httptools

from llmfleet.gateway.fleet import Engine
from llmfleet.gateway.transport.http import Fields, Headers, fields_of
from llmfleet.gateway.transport.limits import HEAD_BYTES, IDLE_CONNECTIONS

_NO_FIELDS: Fields = {}


class Receiver(Protocol):
    """Who gets what an engine answers."""

    def engine_data(self, connection: EngineConnection, data: bytes, complete: bool) -> None:
        """Part of the body, possibly empty. `connection.head_complete` says whether the head has come."""

    def engine_lost(self, connection: EngineConnection, reason: str) -> None:
        """The connection ended before the answer did. The last call for this request."""


class EngineConnection(asyncio.Protocol):
    """One connection. `status` and `headers` are those of the answer at hand."""

    __slots__ = (
        "_complete",
        "_head_bytes",
        "_parser",
        "_parts",
        "_pool",
        "_receiver",
        "_reusable",
        "answered",
        "close_delimited",
        "engine",
        "fields",
        "head_complete",
        "headers",
        "idle_since",
        "reused",
        "status",
        "transport",
    )

    def __init__(self, pool: EnginePool, engine: Engine) -> None:
        self._pool = pool
        self.engine = engine
        self.transport: asyncio.Transport | None = None
        self.reused = False
        """Whether an earlier request was answered on this connection."""
        self.idle_since = 0.0
        self._receiver: Receiver | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.fields: Fields = _NO_FIELDS
        self.head_complete = False
        self.answered = False
        """Whether anything of an answer has come."""
        self._complete = False
        self._reusable = False
        self.close_delimited = False
        """Whether the answer ends with the connection, so that its end looks like the engine's."""
        self._head_bytes = 0
        self._parts: list[bytes] = []

    def send(self, receiver: Receiver, request: bytes) -> None:
        """Sends one request; `receiver` gets the answer."""
        self._reset()
        self._receiver = receiver
        if self.transport is None or self.transport.is_closing():
            self._lose("had closed the connection")
        else:
            self.transport.write(request)

    def pass_to(self, receiver: Receiver) -> None:
        """What follows of the answer goes to another one."""
        self._receiver = receiver

    def abort(self) -> None:
        """Ends the connection at once, which tells the engine to stop working on the request."""
        self._receiver = None
        if self.transport is not None:
            self.transport.abort()

    def release(self) -> None:
        """Gives the connection back after its answer is complete."""
        self._receiver = None
        self._pool.give(self, reusable=self._reusable)

    def pause(self) -> None:
        """Stops reading: the client cannot keep up."""
        if self.transport is not None and self.transport.is_reading():
            self.transport.pause_reading()

    def resume(self) -> None:
        """Reads again."""
        if self.transport is not None and not self.transport.is_closing() and not self.transport.is_reading():
            self.transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None or self._complete:
            # Nobody has asked: whatever this is, the connection is of no use any more.
            self._pool.drop(self)
            self.abort()
            return
        self.answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(f"sent something that is not HTTP ({type(error).__name__})")
            return
        if not self.head_complete:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._break(f"sent a response head of more than {HEAD_BYTES} bytes")
            return
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if body or self._complete:
            self._receiver.engine_data(self, body, self._complete)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.drop(self)
        if self._receiver is None:
            return
        if self.close_delimited and exc is None:
            self._complete = True
            receiver, self._receiver = self._receiver, None
            receiver.engine_data(self, b"", True)
        elif not self.answered:
            self._lose("closed the connection without an answer")
        else:
            self._lose("closed the connection in the middle of its answer")

    def _break(self, reason: str) -> None:
        if self.transport is not None:
            self.transport.abort()
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.engine_lost(self, reason)

    # httptools

    def on_status(self, status: bytes) -> None:
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        self.status = status
        self.head_complete = True
        fields = self.fields = fields_of(self.headers)
        delimited = b"content-length" in fields or b"transfer-encoding" in fields
        self.close_delimited = not delimited and status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._complete = self.head_complete
        self._reusable = self._complete and self._parser.should_keep_alive()


class EnginePool:
    """Idle connections by engine, and the way to new ones."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect_s: float, idle_s: float) -> None:
        self._loop = loop
        self._connect_s = connect_s
        self._idle_s = idle_s
        self._idle: defaultdict[str, list[EngineConnection]] = defaultdict(list)
        self._open: set[EngineConnection] = set()

    def take(self, engine: Engine) -> EngineConnection | None:
        """An idle connection, the one used last, or None."""
        idle = self._idle.get(engine.id)
        while idle:
            connection = idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    async def connect(self, engine: Engine) -> EngineConnection:
        """A new connection. Raises OSError or TimeoutError."""
        async with asyncio.timeout(self._connect_s):
            _, connection = await self._loop.create_connection(
                lambda: EngineConnection(self, engine), engine.host, engine.port
            )
        self._open.add(connection)
        return connection

    def give(self, connection: EngineConnection, *, reusable: bool) -> None:
        """Takes a connection back, or closes it where it is not fit for another request."""
        idle = self._idle[connection.engine.id]
        transport = connection.transport
        if not reusable or transport is None or transport.is_closing() or len(idle) >= IDLE_CONNECTIONS:
            connection.abort()
            return
        connection.resume()
        connection.reused = True
        connection.idle_since = self._loop.time()
        idle.append(connection)

    def drop(self, connection: EngineConnection) -> None:
        """Forgets a connection that has ended."""
        self._open.discard(connection)
        idle = self._idle.get(connection.engine.id)
        if idle is not None and connection in idle:
            idle.remove(connection)

    def prune(self, engines: set[str]) -> None:
        """Closes connections that were idle for too long, or whose engine is not among `engines` any more."""
        oldest = self._loop.time() - self._idle_s
        for engine_id, idle in list(self._idle.items()):
            keep = [c for c in idle if c.idle_since >= oldest] if engine_id in engines else []
            gone = [c for c in idle if c not in keep]
            self._idle[engine_id] = keep
            if not keep:
                del self._idle[engine_id]
            for connection in gone:
                connection.abort()

    async def close(self) -> None:
        """Ends every connection."""
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)
