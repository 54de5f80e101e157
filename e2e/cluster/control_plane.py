"""etcd, API server, controller manager and scheduler: what makes objects into a Kubernetes.

They run the same way in both profiles and differ only in where: the control-plane profile uses a loopback address
and free ports of the host, the node profile an address inside the cluster's own network namespace (`enter` then
gives the command words that get a component in there).

etcd is reached through a socket in the state directory: whoever may not read the directory may not read the
cluster, and no port is taken. It does not wait for the disk, since a cluster's data never outlives its processes.
Everybody else speaks TLS under the cluster's own authority, signs in under a name of its own, and gets what RBAC
grants that name; anonymous requests are refused.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.api_client import ApiClient
from e2e.cluster.binaries import Binaries
from e2e.cluster.certificates import Authority, KeyPair, write_kubeconfig
from e2e.cluster.processes import Processes
from e2e.cluster.state import ClusterError

_START_DEADLINE_S = 180.0
# Below Linux' ephemeral range, so that no outgoing connection takes a port while its server is stopped, and below
# the NodePort range.
_PORTS = range(20_000, 30_000)
# How long a node may be silent before it counts as lost. A node renews its lease four times in that time: with a
# thousand of them, Kubernetes' own 50 s would keep the API server busy with little else.
NODE_GRACE_PERIOD_S = 400
# Relative to the state directory; etcd insists on a port even where there can be none.
_ETCD_SOCKET = "etcd.sock:0"


@dataclass(frozen=True)
class Endpoint:
    """Where the control plane listens.

    host: the address of all three servers, and of the API server for everybody. advertised: the API server's
    address in the `kubernetes` Service; EndpointSlices refuse loopback. services: the cluster IP range.
    """

    host: str
    advertised: str
    services: str
    api_server_port: int
    controller_manager_port: int
    scheduler_port: int

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.api_server_port}"

    @classmethod
    def in_namespaces(cls, address: str, services: str) -> Endpoint:
        """The usual ports on an address inside a network namespace that the cluster has to itself."""
        return cls(address, address, services, 6443, 10257, 10259)

    @classmethod
    def on_loopback(cls, api_server_port: int | None = None) -> Endpoint:
        """Free ports on 127.0.0.1. The advertised address is one reserved for documentation (RFC 5737): nothing
        can reach the API server through the Service here, and nothing in this profile tries."""
        ports = _free_ports(3)
        return cls("127.0.0.1", "198.51.100.1", "10.96.0.0/16", api_server_port or ports[0], ports[1], ports[2])


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, 500):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"no {count} free ports between {_PORTS.start} and {_PORTS.stop - 1} on 127.0.0.1")


def first_address(network: str) -> str:
    """The first host address of an IPv4 network, which is also the `kubernetes` Service's cluster IP."""
    base, _, _ = network.partition("/")
    head, _, last = base.rpartition(".")
    return f"{head}.{int(last) + 1}"


class ControlPlane:
    """The four components of one cluster in `processes.directory`."""

    def __init__(
        self,
        binaries: Binaries,
        processes: Processes,
        endpoint: Endpoint,
        enter: Callable[[], list[str]] = list,
    ) -> None:
        self._binaries = binaries
        self._processes = processes
        self._endpoint = endpoint
        self._enter = enter
        self._authority = Authority(processes.directory / "certificates")

    @property
    def authority(self) -> Authority:
        return self._authority

    @property
    def admin_kubeconfig(self) -> Path:
        return self._processes.directory / "kubeconfig"

    def begin(self) -> None:
        """Start etcd and the API server without waiting for them."""
        self._start_etcd()
        self._start_api_server()

    def complete(self) -> None:
        """Start the rest; returns once the API server is ready, the controllers work and the scheduler runs."""
        self.wait_for_api_server()
        self._start_controller_manager()
        self._start_scheduler()
        self._wait_for_controllers()

    def create_identities(self) -> None:
        """Make the authority, every certificate of the control plane, and the kubeconfigs that carry them."""
        authority = Authority.create(self._authority.directory)
        endpoint = self._endpoint
        service = ("kubernetes", "kubernetes.default", "kubernetes.default.svc")
        addresses = {endpoint.host, endpoint.advertised, first_address(endpoint.services), "127.0.0.1"}
        names = [*(f"DNS:{name}" for name in (*service, "localhost")), *(f"IP:{a}" for a in sorted(addresses))]
        with ThreadPoolExecutor(4) as pool:
            tasks = (
                lambda: authority.server("kube-apiserver", names),
                lambda: authority.server("controllers", [f"IP:{endpoint.host}"]),
                lambda: authority.client("kube-apiserver-kubelet-client"),
                lambda: authority.signing_key("service-accounts"),
                lambda: self.issue_kubeconfig(self.admin_kubeconfig, "admin", ["system:masters"]),
                lambda: self.component_kubeconfig("kube-controller-manager"),
                lambda: self.component_kubeconfig("kube-scheduler"),
            )
            for made in [pool.submit(task) for task in tasks]:
                made.result()

    def issue_kubeconfig(self, path: Path, user: str, groups: Sequence[str] = ()) -> Path:
        """Make an identity and write the kubeconfig that signs in as it."""
        identity = self._authority.client(user, groups)
        return write_kubeconfig(path, self._endpoint.url, self._authority, user, identity)

    def component_kubeconfig(self, component: str, user: str = "", groups: Sequence[str] = ()) -> Path:
        """A component's own kubeconfig; its user name is `system:<component>` unless given."""
        path = self._processes.directory / "components" / f"{component}.kubeconfig"
        return self.issue_kubeconfig(path, user or f"system:{component}", groups)

    def token_kubeconfig(self, path: Path, user: str, token: str) -> Path:
        return write_kubeconfig(path, self._endpoint.url, self._authority, user, token)

    def client(self) -> ApiClient:
        """A connection as the administrator."""
        return self._client(self._endpoint.api_server_port)

    def _client(self, port: int) -> ApiClient:
        return ApiClient(self._endpoint.host, port, self._authority, self._pair("admin"))

    def _pair(self, name: str) -> KeyPair:
        directory = self._authority.directory
        return KeyPair(directory / f"{name}.crt", directory / f"{name}.key")

    def _start_etcd(self) -> None:
        client, peer = f"unix://{_ETCD_SOCKET}", "unix://etcd-peer.sock:0"
        self._run(
            "etcd",
            "--data-dir=etcd",
            "--unsafe-no-fsync",
            "--log-level=warn",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        )

    def _start_api_server(self) -> None:
        endpoint = self._endpoint
        serving, kubelet_client = self._pair("serving-kube-apiserver"), self._pair("kube-apiserver-kubelet-client")
        authority = self._authority.pair.certificate
        tokens = self._authority.directory / "service-accounts"
        self._run(
            "kube-apiserver",
            f"--etcd-servers=unix://{_ETCD_SOCKET}",
            f"--bind-address={endpoint.host}",
            f"--advertise-address={endpoint.advertised}",
            f"--secure-port={endpoint.api_server_port}",
            f"--service-cluster-ip-range={endpoint.services}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={authority}",
            "--anonymous-auth=false",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={tokens}.pub",
            f"--service-account-signing-key-file={tokens}.key",
            f"--kubelet-client-certificate={kubelet_client.certificate}",
            f"--kubelet-client-key={kubelet_client.key}",
            f"--kubelet-certificate-authority={authority}",
            "--kubelet-preferred-address-types=InternalIP",
            "--profiling=false",
        )

    def _start_controller_manager(self) -> None:
        kubeconfig = self._processes.directory / "components" / "kube-controller-manager.kubeconfig"
        authority = self._authority.pair
        self._run(
            "kube-controller-manager",
            *self._controller_flags(kubeconfig, self._endpoint.controller_manager_port),
            "--use-service-account-credentials",
            f"--node-monitor-grace-period={NODE_GRACE_PERIOD_S}s",
            f"--root-ca-file={authority.certificate}",
            f"--service-account-private-key-file={self._authority.directory / 'service-accounts.key'}",
            f"--cluster-signing-cert-file={authority.certificate}",
            f"--cluster-signing-key-file={authority.key}",
        )

    def _start_scheduler(self) -> None:
        kubeconfig = self._processes.directory / "components" / "kube-scheduler.kubeconfig"
        self._run("kube-scheduler", *self._controller_flags(kubeconfig, self._endpoint.scheduler_port))

    def _controller_flags(self, kubeconfig: Path, port: int) -> list[str]:
        serving = self._pair("serving-controllers")
        return [
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--client-ca-file={self._authority.pair.certificate}",
            f"--bind-address={self._endpoint.host}",
            f"--secure-port={port}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            "--leader-elect=false",
            "--profiling=false",
            # The defaults (20 and 50 a second) are made for sparing a shared API server and would be the bottleneck
            # of every test with a thousand objects.
            "--kube-api-qps=300",
            "--kube-api-burst=600",
        ]

    def _run(self, component: str, *flags: str) -> None:
        self._processes.start(component, [*self._enter(), self._binaries[component], *flags])

    def wait_for_api_server(self) -> None:
        with self.client() as client:
            self._processes.wait(
                "ready API server",
                lambda: client.answers("/readyz"),
                ["kube-apiserver", "etcd"],
                _START_DEADLINE_S,
            )

    def _wait_for_controllers(self) -> None:
        # The API server admits no pod into a namespace before its controller has made this account.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        with self.client() as client:
            self._processes.wait(
                "service account made by the controller manager",
                lambda: client.answers(account),
                ["kube-controller-manager", "kube-apiserver"],
                _START_DEADLINE_S,
            )
        with self._client(self._endpoint.scheduler_port) as scheduler:
            self._processes.wait(
                "ready scheduler",
                lambda: scheduler.answers("/readyz"),
                ["kube-scheduler", "kube-apiserver"],
                _START_DEADLINE_S,
            )

    def stop_api_server(self) -> None:
        """Take the API server away as a failing machine would; connections break, data stays."""
        self._processes.stop("kube-apiserver", grace_s=1)

    def start_api_server(self) -> None:
        """Bring it back on the same address and port with the same data; returns when it is ready."""
        if not self._processes.alive("kube-apiserver"):
            self._start_api_server()
        self.wait_for_api_server()
