"""The control port of an engine: asks of authenticated peers come in, a handler's answers go out.

A server belongs to one event loop, which an engine runs in a thread of its own. Each ask is answered by a task of its
own, so that a long poll holds nothing up. Nothing that a peer does or leaves undone keeps the server from serving the
others, and nothing ends it: a bad message is answered by a reason, a bad connection is closed, counted, and logged once
in a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from llmfleet.api import Reason
from llmfleet.api.migration_messages import AnyAnswer, AnyAsk, Journal, MessageError, Refused, parse_ask, to_payload
from llmfleet.migration.frames import (
    CONTROL_HEADER_BYTES,
    ControlFrame,
    ControlKind,
    ControlReader,
    ControlWriter,
    FrameError,
    TooLarge,
)
from llmfleet.migration.handshake import CONTROL, HELLO_BYTES, PROOF_BYTES, HandshakeError, Responder, Session
from llmfleet.migration.ports import host_and_port
from llmfleet.migration.tcp import ControlLimits, close_writer, keep_alive, name_of

log = logging.getLogger(__name__)

LOGGED_AGAIN_S = 60.0
"""A peer that keeps failing in one way is logged so often."""


class Meter(Protocol):
    """Counts what becomes of asks and connections."""

    def answered(self, kind: str, refused: Reason | None) -> None:
        """An ask of this kind was answered: well, or refused for this reason. Kind `unknown`: it could not be read."""
        ...

    def connection_refused(self, reason: Reason) -> None:
        """A connection was closed from this side."""
        ...


class NoMeter:
    """Counts nothing."""

    def answered(self, kind: str, refused: Reason | None) -> None:
        """Nothing."""

    def connection_refused(self, reason: Reason) -> None:
        """Nothing."""


class Peer:
    """Who asks, as a handler sees it. To be used on the server's event loop only."""

    def __init__(self, name: str, writer: asyncio.StreamWriter, frames: ControlWriter, unsent_bytes: int) -> None:
        self.name = name
        """Its address, for people."""
        self.closed = asyncio.Event()
        """Set for good when the connection has ended: its subscriptions have, too."""
        self._writer = writer
        self._frames = frames
        self._unsent_bytes = unsent_bytes

    def publish(self, journal: Journal) -> bool:
        """Sends an event. False: not sent, since the peer reads too slowly or is gone; say it later, `lagging`."""
        if self.closed.is_set() or self._writer.transport.get_write_buffer_size() > self._unsent_bytes:
            return False
        self.send(ControlFrame(ControlKind.EVENT, 0, to_payload(journal)))
        return True

    def send(self, frame: ControlFrame) -> None:
        """Frames are numbered in the order in which they are written, so nothing may come between."""
        self._writer.write(self._frames.frame(frame))


Handler = Callable[[AnyAsk, Peer], Awaitable[AnyAnswer]]
"""Answers an ask. It may wait (long polls), and is cancelled when the peer goes away."""


class ControlServer:
    """Answers peers until it is closed."""

    def __init__(self, key: bytes, handler: Handler, limits: ControlLimits, meter: Meter) -> None:
        self._key = key
        self._handler = handler
        self._limits = limits
        self._meter = meter
        self._handshakes = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._logged: dict[tuple[str, Reason], float] = {}
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Where it listens: told by the system when it was asked for port 0."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def listen(self, address: str) -> None:
        """Begins. Raises ValueError for a bad address and OSError where it is taken."""
        host, port = host_and_port(address)
        self._server = await asyncio.start_server(self._connected, host or None, port)

    async def close(self) -> None:
        """Ends listening and all connections."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        name = name_of(writer)
        if len(self._connections) >= self._limits.connections or self._handshakes >= self._limits.handshakes:
            self._refuse_connection(name, Reason.BUSY, "as many connections as are accepted")
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            session = await self._shake(reader, writer)
            keep_alive(writer.get_extra_info("socket"))
            await self._serve(reader, writer, session, name)
        except HandshakeError as error:
            self._refuse_connection(name, error.reason, str(error))
        except TimeoutError:
            self._refuse_connection(name, Reason.UNAUTHORIZED, "no handshake in time")
        except FrameError as error:
            self._refuse_connection(name, Reason.CORRUPT, str(error))
        except (OSError, EOFError):
            pass  # the peer went away, as peers do
        except asyncio.CancelledError:
            pass  # by close(); asyncio's server would log it as a failure
        except Exception:
            log.exception("control connection of %s failed", name)
        finally:
            self._connections.discard(task)
            await close_writer(writer)

    async def _shake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session:
        self._handshakes += 1
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                responder = Responder(self._key, CONTROL)
                writer.write(responder.reply(await reader.readexactly(HELLO_BYTES)))
                try:
                    return responder.finish(await reader.readexactly(PROOF_BYTES))
                except EOFError:
                    detail = "the peer left before it had proved its key; it may have another one"
                    raise HandshakeError(Reason.UNAUTHORIZED, detail) from None
        finally:
            self._handshakes -= 1

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session, name: str
    ) -> None:
        frames = ControlReader(session.receive_key, self._limits.message_bytes)
        peer = Peer(name, writer, ControlWriter(session.send_key), self._limits.unsent_bytes)
        answering: set[asyncio.Task[None]] = set()
        try:
            while True:
                header = await reader.readexactly(CONTROL_HEADER_BYTES)
                try:
                    rest = frames.rest(header)
                except TooLarge as error:
                    refused = Refused(reason=Reason.TOO_LARGE, detail=str(error))
                    await self._say(peer, writer, error.number, "unknown", refused)
                    self._refuse_connection(name, Reason.TOO_LARGE, str(error))
                    return
                frame = frames.frame(header, await reader.readexactly(rest))
                if frame.kind is not ControlKind.ASK:
                    raise FrameError(f"a frame of kind {frame.kind.name}; accepted is ASK")
                if len(answering) >= self._limits.asks_in_flight:
                    detail = f"{len(answering)} asks of this connection wait for an answer, as many as are accepted"
                    await self._say(peer, writer, frame.number, "unknown", Refused(reason=Reason.BUSY, detail=detail))
                    continue
                task = asyncio.create_task(self._answer(peer, writer, frame))
                answering.add(task)
                task.add_done_callback(answering.discard)
        finally:
            peer.closed.set()
            for task in answering:
                task.cancel()

    async def _answer(self, peer: Peer, writer: asyncio.StreamWriter, frame: ControlFrame) -> None:
        kind = "unknown"
        answer: AnyAnswer
        try:
            ask = parse_ask(frame.payload)
            kind = ask.kind
            answer = await self._handler(ask, peer)
        except MessageError as error:
            answer = error.refused
        except Exception:
            log.exception("answering %s of %s failed", kind, peer.name)
            answer = Refused(reason=Reason.FAILED, detail="the engine's log says how")
        with contextlib.suppress(OSError):
            await self._say(peer, writer, frame.number, kind, answer)

    async def _say(self, peer: Peer, writer: asyncio.StreamWriter, number: int, kind: str, answer: AnyAnswer) -> None:
        self._meter.answered(kind, answer.reason if isinstance(answer, Refused) else None)
        peer.send(ControlFrame(ControlKind.ANSWER, number, to_payload(answer)))
        await writer.drain()

    def _refuse_connection(self, name: str, reason: Reason, detail: str) -> None:
        self._meter.connection_refused(reason)
        host, now_s = name.rpartition(":")[0], time.monotonic()
        if now_s < self._logged.get((host, reason), 0.0):
            return
        if len(self._logged) >= self._limits.connections:
            self._logged.clear()
        self._logged[host, reason] = now_s + LOGGED_AGAIN_S
        log.warning("control connection of %s closed: %s", name, detail)


async def serve(
    listen: str, key: bytes, handler: Handler, limits: ControlLimits | None = None, meter: Meter | None = None
) -> ControlServer:
    """Answers peers on `host:port` by a handler. Raises ValueError for a bad address and OSError where it is taken."""
    server = ControlServer(key, handler, limits or ControlLimits(), meter or NoMeter())
    await server.listen(listen)
    return server
