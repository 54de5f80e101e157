"""Settings of one operator process: where it listens, who it is, whom it asks for demand.

How the fleet is planned and rolled is not here: that is the FleetPolicy object, which changes without a restart.
Nothing here is secret; the token that gateways ask for is named by its file and read when it is used.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


def default_identity() -> str:
    """Name of this process among the replicas: the pod's name in a cluster, and never the same for two processes."""
    return f"{socket.gethostname()}_{os.getpid()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """What `llmfleet operator` is told on its command line."""

    namespace: str = "llmfleet-system"
    """Namespace of the Lease."""
    identity: str = field(default_factory=default_identity)
    """Holder's name in the Lease; unique among the replicas."""
    gateway_urls: tuple[str, ...] = ()
    """Admin addresses of gateways, such as `http://llmfleet-gateway-admin:8081`. A name stands for all its
    addresses, so a headless Service names every gateway pod."""
    gateway_token_file: Path | None = None
    """File with the bearer token of the admin ports; read again before each round, so it may be rotated."""
    listen_host: str = "0.0.0.0"
    """Address of `/healthz`, `/readyz` and `/metrics`."""
    listen_port: int = 8080
    """Port of the same; 0 picks a free one, which the log names."""
    log_format: Literal["json", "console"] = "json"
    """One JSON object per line, or lines for people."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is logged."""
