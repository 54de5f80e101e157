"""The gateway's settings, checked before anything starts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from llmfleet.gateway.transport import Limits

DRAIN_TAINTS = (
    # AWS Node Termination Handler: spot interruption, rebalancing, maintenance, the end of a scaling group's instance.
    "aws-node-termination-handler/spot-itn",
    "aws-node-termination-handler/rebalance-recommendation",
    "aws-node-termination-handler/scheduled-maintenance",
    "aws-node-termination-handler/asg-lifecycle-termination",
    # GKE, in the 30 seconds before a spot or preemptible node goes.
    "cloud.google.com/impending-node-termination",
    # AKS, before scheduled events, spot evictions among them.
    "remediator.aks.microsoft.com/unschedulable",
    # Autoscalers that take a node away.
    "ToBeDeletedByClusterAutoscaler",
    "karpenter.sh/disrupted",
    # Kubernetes itself: the cloud has stopped the machine.
    "node.cloudprovider.kubernetes.io/shutdown",
)
"""Keys of taints upon which a node's engines are left."""

_TAINT_KEY = re.compile(r"([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


class SettingsError(ValueError):
    """A setting is wrong; the message names it, its value and what is accepted."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, setting: str) -> Address:
        """Reads `HOST:PORT`, `[IPv6]:PORT` or `:PORT` (every IPv4 address). Raises SettingsError."""
        try:
            parts = urlsplit(f"//{text}")
            port = parts.port
        except ValueError:
            port = None
        if port is None or parts.path or parts.username is not None:
            raise SettingsError(f"{setting} must be HOST:PORT with a port of 0 to 65535, got {text!r}")
        return cls(parts.hostname or "0.0.0.0", port)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What `llmfleet gateway` is told.

    With `engines` the gateway knows exactly these and asks no Kubernetes; without, it watches the API server that
    `kubeconfig`, `KUBECONFIG`, the pod's service account or `~/.kube/config` names, in this
    order. Raises SettingsError.
    """

    listen: str = "127.0.0.1:8080"
    """Address of the OpenAI API, HOST:PORT."""
    tls_cert: Path | None = None
    """PEM certificate chain of the OpenAI API, with `tls_key`; without them it speaks plain HTTP."""
    tls_key: Path | None = None
    """Its key, PEM, not encrypted."""
    admin_listen: str = "127.0.0.1:8081"
    """Address of metrics, health and demand, HOST:PORT."""
    admin_token_file: Path | None = None
    """File with the bearer token of /v1/demand; without it nobody may read the demand."""
    engines: tuple[str, ...] = ()
    """Static engines: `URL`, or `VARIANT=URL` together with `routing_file`. `#control=HOST:PORT` behind the URL is the
    control port of the engine's migration plug-in."""
    peer_key_file: Path | None = None
    """The key that the static engines' plug-ins were started with; needed where an engine has a control port."""
    routing_file: Path | None = None
    """A RoutingTable as JSON for the static engines; without it one implicit service takes every model."""
    namespace: str | None = None
    """Namespace to watch; absent: all."""
    kubeconfig: Path | None = None
    """Kubeconfig file; absent: `KUBECONFIG`, then the pod's service account, then `~/.kube/config`."""
    drain_taints: tuple[str, ...] = DRAIN_TAINTS
    """Keys of node taints that announce a node's end: streams of its engines are moved."""
    drain_s: float = 300.0
    """How long running requests may finish after SIGTERM, in seconds."""
    log_format: Literal["console", "json"] = "console"
    """Form of the log on stderr."""
    limits: Limits = field(default_factory=Limits)
    """Bounds of the data plane."""

    def __post_init__(self) -> None:
        Address.parse(self.listen, "listen")
        Address.parse(self.admin_listen, "admin-listen")
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls-cert", "tls-key") if self.tls_key is None else ("tls-key", "tls-cert")
            raise SettingsError(f"{given} needs {missing}: a certificate serves only with its key")
        if not 0 <= self.drain_s < math.inf:
            raise SettingsError(f"drain must be 0 or more seconds, got {self.drain_s}")
        if self.routing_file is not None and not self.engines:
            raise SettingsError("routing-file needs engines: with Kubernetes the tables come from the API server")
        if self.engines and (self.namespace is not None or self.kubeconfig is not None):
            raise SettingsError("engines is for running without Kubernetes: leave out namespace and kubeconfig")
        if self.peer_key_file is not None and not self.engines:
            raise SettingsError("peer-key-file needs engines: with Kubernetes each service has a Secret with its key")
        for key in self.drain_taints:
            if not _TAINT_KEY.fullmatch(key):
                raise SettingsError(f"drain-taint must be the key of a taint, such as example.com/ends, got {key!r}")
        for file, setting in ((self.admin_token_file, "admin-token-file"), (self.routing_file, "routing-file")):
            if file is not None and not file.is_file():
                raise SettingsError(f"{setting} must be a readable file, got {file}")
        if self.admin_token_file is not None and not self.admin_token_file.read_text().strip():
            raise SettingsError(f"admin-token-file must hold a token, {self.admin_token_file} is empty")
        for name in Limits.__slots__:
            if not 0 < getattr(self.limits, name) < math.inf:
                raise SettingsError(f"limits.{name} must be positive and finite, got {getattr(self.limits, name)}")
