"""What discovery tells the data plane: services, their engines, and who may use them.

A `Fleet` is immutable. Discovery builds a new one whenever something changes and hands it over whole; services that
did not change are the same objects, so that the receiver finds the differences by identity.

Requests find their service by model name and API key. Two services (in two namespaces) may serve the same name:
then the key decides, before services without keys, and then `namespace/name`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from llmfleet.api import RoutingTable
from llmfleet.gateway.keys import EVERYBODY, ApiKey, KeyRing

ANY_MODEL = "*"
"""Served name of the implicit service of a static engine list: it takes every model name."""


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
    pod: tuple[str, str] | None = None
    """Namespace and name of its pod; None: it is of a static list."""

    authority: bytes = field(init=False, repr=False, compare=False)
    """Value of the Host header."""

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        object.__setattr__(self, "authority", f"{host}:{self.port}".encode())


@dataclass(frozen=True, slots=True)
class Service:
    """One service: its routing table, its engines, its keys."""

    table: RoutingTable
    engines: tuple[Engine, ...]
    keys: KeyRing | None = None
    """Accepted API keys; None: no key is asked for."""
    peer_key: bytes | None = field(default=None, repr=False)
    """What this gateway and the service's engines prove to each other on control ports. None: nothing migrates."""

    key: str = field(init=False, repr=False, compare=False)
    """`namespace/name` of the service."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.table.namespace}/{self.table.service}")

    def rights(self, digest: bytes | None, model: str) -> ApiKey | None:
        """What a client with this key digest may do with this model name; None: nothing."""
        if self.keys is None:
            return EVERYBODY
        key = self.keys.find(digest)
        return key if key is not None and (key.models is None or model in key.models) else None


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

    def knows(self, digest: bytes | None) -> bool:
        """Whether a client with this key digest may use any service; an empty fleet turns nobody away."""
        for service in self.services.values():
            if service.keys is None or service.keys.find(digest) is not None:
                return True
        return not self.services
