"""The data plane: what the rest of the gateway may know of it.

`DataPlane` is narrow on purpose: a fleet goes in, demand comes out. Whatever implements it (this process, a worker
process per core behind a control process, another language) can replace `AsyncioDataPlane`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llmfleet.api import DemandReport, Part
from llmfleet.gateway.fleet import Engine, Fleet
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving.asked import move
from llmfleet.gateway.moving.drains import DrainNews
from llmfleet.gateway.policy import Router
from llmfleet.gateway.transport.limits import SOCKET_SEND_BYTES, Limits
from llmfleet.gateway.transport.plane import Plane
from llmfleet.gateway.transport.server import ClientConnection
from llmfleet.gateway.transport.tls import HANDSHAKE_S, SHUTDOWN_S
from llmfleet.migration.outcome import Outcome

log = logging.getLogger("llmfleet.gateway")

_PRUNE_EVERY_S = 5.0
_BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class EngineState:
    """An engine of the fleet, for people."""

    service: str
    """`namespace/name`."""
    engine: Engine
    requests: int
    """Of this gateway that run there."""


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request that runs, for people. Nothing of what was asked or answered."""

    id: str
    """The `x-request-id` that its client got."""
    service: str
    """`namespace/name`."""
    engine: str
    streamed: bool
    answered_tokens: int
    """About so many."""
    can_move: bool
    moving: bool


class DataPlane(Protocol):
    """Serves clients on one address."""

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listens, with TLS if given, and gives the port (the free one that was found, for port 0). Raises OSError."""

    def update(self, fleet: Fleet) -> None:
        """Adopts a snapshot of the fleet."""

    def demand(self, detail: Part | None = None) -> DemandReport:
        """Cumulative demand since the start, and sizes, observations and loads of the services that `detail` holds."""

    def ready(self) -> bool:
        """Whether a fleet is known and the plane is not draining."""

    def engines(self) -> list[EngineState]:
        """Every engine of the fleet."""

    def requests(self, engine_id: str) -> list[RequestState]:
        """Every request of this gateway that runs there. Raises KeyError for an engine that is not there."""

    async def migrate(self, request_id: str, engine_id: str | None) -> tuple[str, Outcome]:
        """Moves a request, and gives the engine on which it runs then. Raises `moving.asked`'s errors."""

    def leave(self, engine_id: str) -> None:
        """The engine gets no new requests and its streams move away. Raises KeyError for one that is not there."""

    def stay(self, engine_id: str) -> None:
        """Takes back what `leave` asked for. Raises KeyError for an engine that is not there."""

    def tell_drains(self, listener: Callable[[DrainNews], None]) -> None:
        """Who is told what becomes of the streams of engines that leave."""

    async def drain(self, grace_s: float) -> None:
        """Stops accepting, lets requests finish for at most `grace_s` seconds, then ends what is left."""


class AsyncioDataPlane:
    """A data plane on the running event loop."""

    def __init__(self, router: Router, limits: Limits, metrics: GatewayMetrics) -> None:
        self._plane = Plane(asyncio.get_running_loop(), router, limits, metrics)
        self._server: asyncio.Server | None = None
        self._connections: set[ClientConnection] = set()
        self._empty = asyncio.Event()
        self._pruner: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """See DataPlane."""
        listener = listening_socket(host, port)
        try:
            # Accepted sockets inherit it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_SEND_BYTES)
            self._server = await self._plane.loop.create_server(
                self._accept,
                sock=listener,
                backlog=_BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_S if tls else None,
                ssl_shutdown_timeout=SHUTDOWN_S if tls else None,
            )
        except BaseException:
            listener.close()
            raise
        self._prune()
        bound: int = listener.getsockname()[1]
        return bound

    def update(self, fleet: Fleet) -> None:
        """See DataPlane."""
        self._plane.update(fleet)

    def demand(self, detail: Part | None = None) -> DemandReport:
        """See DataPlane."""
        return self._plane.router.demand(detail)

    def ready(self) -> bool:
        """See DataPlane."""
        return self._plane.synced and not self._plane.draining

    def engines(self) -> list[EngineState]:
        """See DataPlane."""
        return [
            EngineState(service.key, engine, len(self._plane.moves.running(engine.id)))
            for service in self._plane.fleet.services.values()
            for engine in service.engines
        ]

    def requests(self, engine_id: str) -> list[RequestState]:
        """See DataPlane."""
        moves, engine = self._plane.moves, self._engine(engine_id)
        return [
            RequestState(
                id=request.client_request,
                service=request.service_key,
                engine=engine.id,
                streamed=request.streamed,
                answered_tokens=request.answered_tokens(),
                can_move=request.can_move,
                moving=request in moves.moving,
            )
            for request in moves.running(engine_id)
        ]

    async def migrate(self, request_id: str, engine_id: str | None) -> tuple[str, Outcome]:
        """See DataPlane."""
        return await move(self._plane.moves, request_id, engine_id)

    def leave(self, engine_id: str) -> None:
        """See DataPlane."""
        self._engine(engine_id)
        self._plane.moves.ask_to_leave(engine_id)
        self._plane.update(self._plane.unmarked)

    def stay(self, engine_id: str) -> None:
        """See DataPlane."""
        self._engine(engine_id)
        self._plane.moves.ask_to_stay(engine_id)
        self._plane.update(self._plane.unmarked)

    def _engine(self, engine_id: str) -> Engine:
        return self._plane.moves.engines()[engine_id]

    def tell_drains(self, listener: Callable[[DrainNews], None]) -> None:
        """See DataPlane."""
        self._plane.moves.tell = listener

    async def drain(self, grace_s: float) -> None:
        """See DataPlane."""
        self._plane.draining = True
        if self._server is not None:
            self._server.close()
        if self._pruner is not None:
            self._pruner.cancel()
        for connection in list(self._connections):
            connection.drain()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        if unfinished := sum(connection.busy for connection in self._connections):
            log.warning("ending %d requests that did not finish within %g s", unfinished, grace_s)
        for connection in list(self._connections):
            connection.abort()
        await self._plane.moves.close()
        await self._plane.pool.close()

    def _accept(self) -> ClientConnection:
        return ClientConnection(self._plane, self._made, self._lost)

    def _made(self, connection: ClientConnection) -> bool:
        """A client is there, its handshake done: one whose handshake fails never is. Whether there is room for it."""
        room = len(self._connections) < self._plane.limits.connections
        self._connections.add(connection)
        self._empty.clear()
        return room

    def _lost(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _prune(self) -> None:
        self._plane.prune()
        self._pruner = self._plane.loop.call_later(_PRUNE_EVERY_S, self._prune)


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not block. Raises OSError naming the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener
