"""What both ends of a control connection know of TCP: limits, and how a connection is kept and ended.

In flow sockets; out flow `ControlLimits` for both, and sockets on which a peer that is gone is noticed.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ControlLimits:
    """What one side takes of its peers."""

    connections: int = 256
    handshakes: int = 64
    """Connections at once that have not proved the key yet."""
    handshake_s: float = 5.0
    asks_in_flight: int = 1024
    """On one connection: a hundred migrations at once have a few questions each, most of them long polls."""
    message_bytes: int = 32 * 2**20
    unsent_bytes: int = 4 * 2**20
    """A peer that has so much left to read is told no events."""
    journals: int = 1024
    """Events that wait for a subscription's reader before it has lost its place."""


class HasOptions(Protocol):
    """A socket, or what asyncio gives in its place."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def keep_alive(connection: HasOptions) -> None:
    """A peer whose machine is gone is noticed within half a minute, whether or not something is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 25_000)
    ):  # fmt: skip
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def name_of(writer: asyncio.StreamWriter) -> str:
    """The other end's address, for people."""
    host, port, *_ = writer.get_extra_info("peername") or ("unknown", 0)
    return f"{host}:{port}"


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """What is written is given a moment to leave; a peer that does not read is not waited for."""
    writer.close()
    try:
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()
