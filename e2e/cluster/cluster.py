"""A local Kubernetes cluster as one object: start it, use it, end it.

    with Cluster.start("control-plane") as cluster:
        cluster.add_kwok_nodes(3, allocatable={"cpu": "8", "memory": "64Gi", "example.com/gpu": "4"})
        cluster.kubectl("apply", "--server-side", "-f", "crds/")

A cluster started this way belongs to this process and ends with the `with` block; if the process dies first, the
next start or `down` of anybody using the same cache removes what it left. `detached=True` (the command line's `up`)
leaves it running for later commands, which find it by its name through `Cluster.attach`.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from types import TracebackType

from e2e.cluster.api_client import ApiClient, Json, is_ready
from e2e.cluster.binaries import NEEDED, Binaries, Report, ensure_binaries
from e2e.cluster.control_plane import ControlPlane, Endpoint
from e2e.cluster.debian import ensure_packages
from e2e.cluster.kwok import kwok_node, start_kwok
from e2e.cluster.network import NodeNetwork, choose_block, host_networks
from e2e.cluster.node import NODE_NAME, Node
from e2e.cluster.processes import Processes, clean_environment
from e2e.cluster.removal import remove_abandoned, remove_cluster
from e2e.cluster.state import (
    PROFILES,
    ClusterError,
    Owner,
    Profile,
    Record,
    cache_directory,
    cluster_directory,
    exclusive,
    read_record,
    state_directories,
)

_KUBECTL_DEADLINE_S = 180
_CONNECTIONS = 8


def silent(line: str) -> None:
    """The report of a start that nobody watches."""


class Cluster:
    """A running cluster. Make one with `start` or `attach`.

    Not for several threads at once, but any number of processes may use the kubeconfig.
    """

    def __init__(self, record: Record, binaries: Binaries) -> None:
        self.directory = cluster_directory(record.name)
        """Its state; processes that carry its mark (`processes.marked_environment`) end with the cluster."""
        self._record = record
        self._binaries = binaries
        self._processes = Processes(self.directory, binaries.search_path)
        if record.block is None:
            self._node = None
            endpoint = Endpoint.on_loopback(record.port)
            self._control_plane = ControlPlane(binaries, self._processes, endpoint)
        else:
            network = NodeNetwork(record.block)
            self._node = Node(binaries, self._processes, network)
            endpoint = Endpoint.in_namespaces(network.node_address, network.services)
            self._control_plane = ControlPlane(binaries, self._processes, endpoint, self._node.enter)

    @classmethod
    def start(
        cls,
        profile: Profile = "control-plane",
        name: str | None = None,
        *,
        detached: bool = False,
        report: Report = silent,
    ) -> Cluster:
        """Start a cluster, building what it needs first; returns when it is ready to schedule pods.

        An already running detached cluster of the same name and profile is returned as it is. Raises ClusterError
        when the name belongs to another live process or profile, and for any part that does not start; nothing is
        left behind then, nor after an interrupt.
        """
        if profile not in PROFILES:
            raise ClusterError(f"cluster profile {profile!r} is unknown: use one of {', '.join(PROFILES)}")
        if profile == "node" and os.geteuid() != 0:
            raise ClusterError("the node profile needs root: it makes namespaces, mounts and cgroups")
        binaries = ensure_binaries(NEEDED[profile], report)
        if profile == "node":
            with exclusive(binaries.directory):
                ensure_packages(binaries.search_path, report)
        name = name or f"{profile}-{os.getpid()}-{secrets.token_hex(2)}"
        directory = cluster_directory(name)
        remove_abandoned()
        with exclusive(cache_directory()):
            if existing := read_record(directory):
                if running := cls._running(existing, profile, binaries):
                    report(f"cluster {name} is already running")
                    return running
                report(f"removing the broken cluster {name} ...")
                remove_cluster(directory)
            block = choose_block([*host_networks(), *_taken_blocks()]) if profile == "node" else None
            port = Endpoint.on_loopback().api_server_port
            directory.mkdir(mode=0o700, parents=True)
            record = Record(name, profile, "starting", Owner.this_process(), port, block)
            record.save(directory)
        cluster = cls(record, binaries)
        try:
            cluster._bring_up(report)
            cluster._record = replace(record, phase="ready", owner=None if detached else record.owner)
            cluster._record.save(directory)
        except BaseException:
            cluster.down()
            raise
        return cluster

    @classmethod
    def _running(cls, record: Record, profile: Profile, binaries: Binaries) -> Cluster | None:
        """The live cluster behind a record, or None where it may be removed."""
        if record.owner is not None:
            raise ClusterError(f"cluster {record.name} belongs to the live process {record.owner.pid}")
        cluster = cls(record, binaries)
        if not cluster.healthy():
            return None
        if record.profile != profile:
            raise ClusterError(
                f"cluster {record.name} is running with the profile {record.profile}, not {profile}: "
                "take it down first or choose another name"
            )
        return cluster

    @classmethod
    def attach(cls, name: str) -> Cluster:
        """The ready cluster of that name, whoever started it. Raises ClusterError where there is none."""
        record = read_record(cluster_directory(name))
        if record is None or record.phase != "ready" or record.abandoned():
            raise ClusterError(f"no cluster {name} is running")
        return cls(record, ensure_binaries(NEEDED[record.profile], silent))

    def _bring_up(self, report: Report) -> None:
        control_plane, node = self._control_plane, self._node
        control_plane.create_identities()
        if node:
            report("making the node's namespaces ...")
            node.create_namespaces()
            node.start_runtime()
        report("waiting for etcd, API server, controllers and scheduler ...")
        control_plane.begin()
        if node:
            node.load_base_images()
        control_plane.complete()
        with control_plane.client() as client:
            start_kwok(self._binaries, self._processes, control_plane, client, node.enter() if node else [])
            if node:
                report("waiting for the node to be Ready ...")
                node.start_kubelet(control_plane, control_plane.authority, client)

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def profile(self) -> Profile:
        return self._record.profile

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig; complete in itself."""
        return self._control_plane.admin_kubeconfig

    @property
    def binaries(self) -> Binaries:
        return self._binaries

    def components(self) -> dict[str, list[int]]:
        """The components that were started, each with the pids it has now (none where it ended)."""
        logs = sorted((self.directory / "logs").glob("*.log"))
        return {log.stem: self._processes.pids(log.stem) for log in logs}

    def healthy(self) -> bool:
        """Whether the API server is ready and no component has ended."""
        components = self.components()
        if not components or not all(components.values()):
            return False
        with self._control_plane.client() as client:
            return client.answers("/readyz")

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Run kubectl as the administrator and return its standard output.

        Raises ClusterError with kubectl's own words when it fails or takes longer than three minutes.
        """
        # What kubectl caches in the home directory would outlive the cluster, and mislead it about the next one
        # at the same address.
        mine = [f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.directory / 'kubectl-cache'}"]
        command = [str(self._binaries["kubectl"]), *mine, *map(str, arguments)]
        said = shlex.join(["kubectl", *map(str, arguments)])
        try:
            done = subprocess.run(
                command,
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                env=clean_environment() | {"KUBERC": "off"},
                timeout=_KUBECTL_DEADLINE_S,
            )
        except subprocess.TimeoutExpired as late:
            raise ClusterError(f"{said} did not end within {_KUBECTL_DEADLINE_S} s") from late
        if done.returncode != 0:
            raise ClusterError(f"{said} failed: {done.stderr.strip()}")
        return done.stdout

    def stop_api_server(self) -> None:
        """An outage: connections break and new ones are refused until `start_api_server`."""
        self._control_plane.stop_api_server()

    def start_api_server(self) -> None:
        """End the outage: same data, same address. Returns when the API server is ready."""
        self._control_plane.start_api_server()

    def add_kwok_nodes(
        self,
        count: int,
        *,
        labels: Mapping[str, str] | None = None,
        allocatable: Mapping[str, str] | None = None,
        prefix: str = "kwok",
    ) -> list[str]:
        """Add nodes `<prefix>-0` to `<prefix>-<count-1>` without machines behind them; returns their names.

        `allocatable` adds to, or overrides, a default of 64 cores, 512Gi and 256 pods per node.
        """
        resources = {"cpu": "64", "memory": "512Gi", "pods": "256", **(allocatable or {})}
        names = [f"{prefix}-{index}" for index in range(count)]
        nodes = [kwok_node(name, labels or {}, resources) for name in names]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for done in [pool.submit(self._create_nodes, nodes[start::_CONNECTIONS]) for start in range(_CONNECTIONS)]:
                done.result()
        awaited = list(names)
        with self._control_plane.client() as client:
            self._processes.wait(
                f"{count} Ready kwok nodes",
                lambda: _all_ready(client, awaited),
                ["kwok", "kube-apiserver"],
                deadline_s=120 + count / 10,
            )
        return names

    def _create_nodes(self, nodes: Sequence[Json]) -> None:
        with self._control_plane.client() as client:
            for node in nodes:
                client.create("/api/v1/nodes", node)

    def create_namespace(self, name: str) -> None:
        """A new namespace; returns once it has the service account that its pods need."""
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        with self._control_plane.client() as client:
            client.create("/api/v1/namespaces", {"metadata": {"name": name}})
            self._processes.wait(
                f"service account of namespace {name}",
                lambda: client.answers(account),
                ["kube-controller-manager", "kube-apiserver"],
                deadline_s=30,
            )

    def end_workloads(self, namespace: str) -> None:
        """Delete a namespace's Deployments and pods, without waiting until they are gone.

        The namespace stays until the cluster ends: to delete one, Kubernetes asks for objects of every kind that it
        knows, which takes a third of a second of CPU time.
        """
        with self._control_plane.client() as client:
            client.request("DELETE", f"/apis/apps/v1/namespaces/{namespace}/deployments")
            client.request("DELETE", f"/api/v1/namespaces/{namespace}/pods")

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig that signs in as an existing service account, by a token from the TokenRequest API that
        is good for a day. Raises ClusterError where the account does not exist."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        with self._control_plane.client() as client:
            answer = client.create(path, {"spec": {"expirationSeconds": 24 * 3600}})
        target = self.directory / "service-accounts" / f"{namespace}.{name}.kubeconfig"
        user = f"system:serviceaccount:{namespace}:{name}"
        return self._control_plane.token_kubeconfig(target, user, answer["status"]["token"])

    @property
    def node_name(self) -> str:
        """The name of the real node. Raises ClusterError in the control-plane profile."""
        self._real_node()
        return NODE_NAME

    def load_image(self, archive: Path) -> None:
        """Make the images in an archive (`docker save` or OCI layout) available to pods (node profile)."""
        self._real_node().load_image(archive)

    def advertise(self, node: str, resources: Mapping[str, int], labels: Mapping[str, str] | None = None) -> None:
        """Let a node offer extended resources (name -> count) and carry labels, as a device plug-in would.

        The kubelet keeps resources that it does not know of. Returns once the scheduler may use them.
        """
        amounts = {name: str(count) for name, count in resources.items()}
        path = f"/api/v1/nodes/{node}"
        with self._control_plane.client() as client:
            if labels:
                client.merge(path, {"metadata": {"labels": dict(labels)}})
            client.merge(f"{path}/status", {"status": {"capacity": amounts, "allocatable": amounts}})

    def _real_node(self) -> Node:
        if self._node is None:
            raise ClusterError(f"cluster {self.name} has no real node: start it with the profile node")
        return self._node

    def down(self) -> None:
        """End the cluster and remove all it left on the machine but the built binaries."""
        self._processes.kill_all()
        with exclusive(cache_directory()):
            remove_cluster(self.directory)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()


def _taken_blocks() -> list[IPv4Network]:
    """The address blocks of this cache's clusters, also of those that have no routes yet."""
    records = [read_record(directory) for directory in state_directories()]
    return [IPv4Network(record.block) for record in records if record and record.block]


def _all_ready(client: ApiClient, awaited: list[str]) -> bool:
    """Take the nodes that are Ready off `awaited`, until one is not; whether none is left.

    Node by node, because a list of a thousand nodes is megabytes and this is asked many times a second.
    """
    while awaited and is_ready(client.get(f"/api/v1/nodes/{awaited[-1]}")):
        awaited.pop()
    return not awaited
