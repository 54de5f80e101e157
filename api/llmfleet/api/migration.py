"""Why a running request did not move from one engine to another: the words that engines, the owner of the stream and
the coordinator use for it (RFC 2).
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a migration did not come about, or ended. The list is closed."""

    UNKNOWN_REQUEST = "unknown_request"
    FINISHED = "finished"
    """The request ended by itself first."""
    SAME_ENGINE = "same_engine"
    INCOMPATIBLE = "incompatible"
    """The engines differ in a field of the fingerprint."""
    UNSUPPORTED = "unsupported"
    """The request uses something that cannot be carried exactly."""
    NO_ROOM = "no_room"
    BUSY = "busy"
    """Another migration of the request runs, or as many as the engine takes at once."""
    STALE_EPOCH = "stale_epoch"
    EXPIRED = "expired"
    """A lease ended."""
    LAGGING = "lagging"
    """The copy does not catch up with the request."""
    CORRUPT = "corrupt"
    PEER_LOST = "peer_lost"
    RESTARTED = "restarted"
    """The engine is another process than the one that was asked before."""
    CANCELLED = "cancelled"
    """The coordinator or the client wanted it no more."""
    UNAUTHORIZED = "unauthorized"
    MALFORMED = "malformed"
    UNSUPPORTED_VERSION = "unsupported_version"
    TOO_LARGE = "too_large"
