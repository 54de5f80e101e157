"""What discovery tells the data plane: services, their engines, and who may use them.

A `Fleet` is immutable. Discovery builds a new one whenever something changes and hands it over whole; services that
did not change are the same objects, so that the receiver finds the differences by identity.

Requests find their service by model name and API key. Two services (in two namespaces) may serve the same name:
then the key decides, before services without keys, and then `namespace/name`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from llmfleet.api import RoutingTable

ANY_MODEL = "*"
"""Served name of the implicit service of a static engine list: it takes every model name."""


class KeyRing:
    """The API keys of one service, kept as SHA-256 digests.

    An empty ring accepts nobody: that is what a missing Secret means.
    """

    __slots__ = ("_digests",)

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._digests = tuple(sorted({hashlib.sha256(key).digest() for key in keys if key}))

    def accepts(self, digest: bytes | None) -> bool:
        """Whether the key with this `key_digest` is one of the ring's. Compares with every key in constant time."""
        if digest is None:
            return False
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyRing) and self._digests == other._digests

    def __hash__(self) -> int:
        return hash(self._digests)


def key_digest(key: bytes | None) -> bytes | None:
    """What a `KeyRing` compares: the SHA-256 digest of a presented key, None where none was presented."""
    return hashlib.sha256(key).digest() if key else None


class LeavingReason(StrEnum):
    """Why an engine gets no new requests while it still runs old ones."""

    ASKED = "asked"
    """By hand, on a gateway's admin port."""
    DELETED = "deleted"
    """Its pod terminates."""
    DRAINING = "draining"
    """The operator takes it away."""
    CORDONED = "cordoned"
    """Its node takes no new pods."""
    TAINTED = "tainted"
    """Its node has a taint that announces its end."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """An engine that gets no new requests; its streams are moved away."""

    reason: LeavingReason
    until_s: float | None = None
    """Unix time in seconds at which it is gone; None: nobody knows."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine of a service, from the moment at which it serves to the moment at which it is gone."""

    id: str
    """Unique, never reused, and another one where the address is: the pod's uid with its address, or the URL of a
    static engine."""
    host: str
    port: int
    variant: str
    control: str | None = None
    """`host:port` of its migration plug-in's control port; None: it has none, and its streams cannot move."""
    leaving: Leaving | None = None
    """It gets no new requests; None: it does."""
    revision: str = ""
    """Weights and adapters as the operator numbers them. Streams move between engines of one revision only."""

    @property
    def authority(self) -> bytes:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode()


@dataclass(frozen=True, slots=True)
class Service:
    """One service: its routing table, its engines, its keys."""

    table: RoutingTable
    engines: tuple[Engine, ...]
    keys: KeyRing | None = None
    """Accepted API keys; None: no key is asked for."""
    peer_key: bytes | None = field(default=None, repr=False)
    """What this gateway and the service's engines prove to each other on control ports. None: nothing migrates."""

    @property
    def key(self) -> str:
        """`namespace/name` of the service."""
        return f"{self.table.namespace}/{self.table.service}"

    def admits(self, digest: bytes | None) -> bool:
        """Whether a client with this key digest may use the service."""
        return self.keys is None or self.keys.accepts(digest)


class Fleet:
    """An immutable snapshot of all services."""

    __slots__ = ("_by_model", "services")

    def __init__(self, services: Iterable[Service] = ()) -> None:
        self.services: dict[str, Service] = {s.key: s for s in sorted(services, key=lambda s: s.key)}
        self._by_model: dict[str, list[Service]] = defaultdict(list)
        for service in sorted(self.services.values(), key=lambda s: s.keys is None):
            self._by_model[service.table.served_name].append(service)

    def offering(self, model: str) -> list[Service]:
        """Services that serve a model name; empty where nobody does.

        Those with keys come first, so that nobody takes over another's name and clients with an open service."""
        return self._by_model.get(model) or self._by_model.get(ANY_MODEL, [])
