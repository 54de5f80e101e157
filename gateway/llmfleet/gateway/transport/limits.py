"""The data plane's bounds: every wait has a deadline, every buffer a size."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_BYTES = 64 * 1024
"""Largest request head (request line and headers)."""
SOCKET_SEND_BYTES = 256 * 1024
"""SO_SNDBUF of client sockets. Left alone, the kernel buffers 8 MB and more for a client that has stopped reading."""
WRITE_HIGH_BYTES = 256 * 1024
"""Bytes waiting for a client beyond which its engine is not read any more."""
HOLD_BYTES = 1024 * 1024
"""Largest complete answer that is held back until it is whole (so that it can be retried and its usage read), and
largest part of an event that is held back until its end comes."""
PIPELINE_BYTES = 64 * 1024
"""Bytes that a client may send ahead while its request is worked on."""
IDLE_CONNECTIONS = 256
"""Idle connections kept per engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that an operator of the gateway may want to change. Times in seconds."""

    connections: int = 16384
    """Connections of clients at once; more are answered with 503 and closed."""
    body_bytes: int = 32 * 1024 * 1024
    """Largest request body."""
    all_bodies_bytes: int = 1024 * 1024 * 1024
    """Bodies of all requests together, which are kept until their answers have ended; the request that goes beyond is
    answered with 503."""
    queue_wait_s: float = 300.0
    """How long a request may wait for an engine."""
    queue_length: int = 1024
    """Requests of one service that may wait at once."""
    connect_s: float = 2.0
    """How long a connection to an engine may take."""
    first_byte_s: float = 120.0
    """How long an engine may take to its first token of a stream."""
    answer_s: float = 600.0
    """How long an engine may take to an answer that is not streamed."""
    idle_s: float = 60.0
    """How long a stream may be silent, and a client may read nothing at all."""
    client_idle_s: float = 75.0
    """How long a client's connection may be idle, or a request take to arrive."""
    engine_idle_s: float = 30.0
    """How long an idle connection to an engine is kept."""
