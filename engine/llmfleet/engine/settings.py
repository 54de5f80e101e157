"""What the plug-in is told by `--additional-config '{"llmfleet": {...}}'` (`llmfleet.migration.engine_arguments`)."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


class InvalidSettings(ValueError):
    """The engine does not start: the message names the setting, its value and what would be accepted."""


@dataclass(frozen=True)
class Settings:
    """listen: host:port of the control port. Data comes to the same host, at a port of the kernel's choice."""

    listen: str
    peer_key_file: str
    most_incoming: int = 16
    """Requests that may be on their way here at once."""
    most_outgoing: int = 16
    most_reserved_share: float = 0.5
    """Of all blocks, at most this part is reserved for requests that are on their way here."""
    growth_tokens: int = 256
    """Blocks are reserved for so many tokens more than the request has when it is announced."""
    lease_s: float = 10.0

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0]

    @property
    def data_host(self) -> str:
        """The host under which peers reach this engine."""
        if self.host in ("", "0.0.0.0", "[::]"):
            return socket.gethostbyname(socket.gethostname())
        return self.host


def settings_from(additional_config: object) -> Settings | None:
    """The settings, or None where there are none. Raises InvalidSettings."""
    given = additional_config.get("llmfleet") if isinstance(additional_config, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InvalidSettings(f"additional_config.llmfleet must be an object, not {given!r}")
    known = {field.name: field for field in fields(Settings)}
    for name in given:
        if name not in known:
            raise InvalidSettings(f"additional_config.llmfleet.{name} is unknown; known: {', '.join(known)}")
    for name in ("listen", "peer_key_file"):
        if not isinstance(given.get(name), str) or not given[name]:
            raise InvalidSettings(f"additional_config.llmfleet.{name} must be a text, not {given.get(name)!r}")
    port = given["listen"].rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidSettings(f"additional_config.llmfleet.listen must be HOST:PORT, not {given['listen']!r}")
    for name in ("most_incoming", "most_outgoing", "growth_tokens"):
        _number(given, name, int, 0 if name == "growth_tokens" else 1, 1_000_000)
    _number(given, "most_reserved_share", (int, float), 0.0, 1.0)
    _number(given, "lease_s", (int, float), 0.5, 3600.0)
    return Settings(**given)


def _number(given: Mapping[str, Any], name: str, kind: Any, low: float, high: float) -> None:
    value = given.get(name, low)
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidSettings(f"additional_config.llmfleet.{name} must be from {low} to {high}, not {value!r}")
