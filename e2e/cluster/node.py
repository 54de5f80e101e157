"""A real node: kubelet, containerd and kube-proxy in network, mount and PID namespaces of their own.

The first process of the PID namespace is our `pause`: it only reaps. Everything else of the cluster, the control
plane included, is started inside by `nsenter`, so killing that one process ends all of it at once: components,
containers, mounts, bridge, firewall rules, and the veth pair.

Inside, /run is a tmpfs and /var an overlay that forgets: containerd, the CNI library and the kubelet write to places
in both that cannot be configured. The state directory shows through unchanged.

What this machine must not be assumed to allow, and the settings that answer it, is said beside each setting.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

from e2e.cluster.api_client import ApiClient, Json, grant_cluster_role, is_ready
from e2e.cluster.binaries import Binaries
from e2e.cluster.certificates import Authority
from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.debian import cni_plugins
from e2e.cluster.images import write_scratch_image
from e2e.cluster.network import NodeNetwork, connect
from e2e.cluster.processes import Processes
from e2e.cluster.removal import cgroup_name, cgroup_parents, host_link, node_link
from e2e.cluster.state import ClusterError

NODE_NAME = "node-0"
SANDBOX_IMAGE = "localhost/pause:1"
# The same scratch image under the name that the demo's engine pods use: they run the host's Python by hostPath.
ENGINE_IMAGE = "localhost/llmfleet-engine:demo"

_NAMESPACES = "namespaces"
_SOCKET = "/run/containerd/containerd.sock"
# Ten times shorter than the default, so that a throttled container is slow evenly instead of stopping for up to
# 100 ms at a time. Not shorter: the kubelet's smallest quota is 1 ms, which is then a tenth of a core.
_CPU_QUOTA_PERIOD = "10ms"


class Node:
    """The node of the cluster in `processes.directory`."""

    def __init__(self, binaries: Binaries, processes: Processes, network: NodeNetwork) -> None:
        self._binaries = binaries
        self._processes = processes
        self._directory = processes.directory
        self._network = network

    def create_namespaces(self) -> None:
        """Make the namespaces, the link to the host, and the cgroup for pods."""
        unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc"]
        self._processes.start(_NAMESPACES, [*unshare, self._binaries["pause"]])
        self._processes.wait("namespaces", lambda: self._first_process() is not None, [_NAMESPACES], 60)
        pid = self._first_process()
        assert pid is not None
        connect(self._network, host_link(self._directory), node_link(self._directory), pid)
        self._inside("sh", "-euc", self._inner_setup())
        for parent in cgroup_parents():
            _create_cgroup(parent / cgroup_name(self._directory))

    def _inner_setup(self) -> str:
        state, link = shlex.quote(str(self._directory)), node_link(self._directory)
        return f"""
            mount -t tmpfs tmpfs /run
            mkdir -p /run/state /run/var/upper /run/var/work /run/netns /run/lock
            mount --bind {state} /run/state
            mount -t overlay -o lowerdir=/var,upperdir=/run/var/upper,workdir=/run/var/work overlay /var
            mkdir -p {state}
            mount --bind /run/state {state}
            ip link set lo up
            ip address add {self._network.node_address}/30 dev {link}
            ip link set {link} up
            ip route add default via {self._network.host_address}
            echo 1 > /proc/sys/net/ipv4/ip_forward
        """

    def _first_process(self) -> int | None:
        """The host's pid of the PID namespace's first process, once it has become `pause`."""
        for pid in self._processes.pids(_NAMESPACES):
            try:
                if Path(f"/proc/{pid}/comm").read_text().strip() == "pause":
                    return pid
            except OSError:
                continue
        return None

    def enter(self) -> list[str]:
        """The command words that run what follows them inside, in the state directory.

        Raises ClusterError where the namespaces are gone.
        """
        pid = self._first_process()
        if pid is None:
            raise ClusterError(f"the namespaces of {self._directory.name} are gone")
        # Entering a mount namespace moves to its root directory; env moves back.
        into = ["nsenter", f"--target={pid}", "--net", "--mount", "--pid", "--"]
        return [*into, "env", f"--chdir={self._directory}"]

    def _inside(self, *command: str | Path) -> None:
        words = [*self.enter(), *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, env=self._processes.environment("setup"))
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise ClusterError(f"{' '.join(map(str, command[:2]))} failed inside the node's namespaces: {said}")

    def start_runtime(self) -> None:
        """Start containerd; `load_base_images` waits for it."""
        conflist = self._directory / "cni" / "10-bridge.conflist"
        conflist.parent.mkdir()
        conflist.write_text(json.dumps(self._cni_configuration(), indent=1))
        configuration = self._directory / "containerd.toml"
        configuration.write_text(self._containerd_configuration())
        self._processes.start("containerd", [*self.enter(), self._binaries["containerd"], "-c", configuration])

    def load_base_images(self) -> None:
        """Import the sandbox image and its namesakes once containerd answers."""
        archive = self._directory / "pause.tar"
        files = {"/pause": self._binaries["pause"]}
        write_scratch_image(archive, [SANDBOX_IMAGE, ENGINE_IMAGE], files, ["/pause"])

        def answers() -> bool:
            command = [*self.enter(), str(self._binaries["ctr"]), f"--address={_SOCKET}", "version"]
            environment = self._processes.environment("setup")
            return subprocess.run(command, capture_output=True, env=environment).returncode == 0

        self._processes.wait("answering containerd", answers, ["containerd"], 120)
        self.load_image(archive)
        archive.unlink()

    def load_image(self, archive: Path) -> None:
        """Make the images of an archive (`docker save` or OCI layout) known to the kubelet."""
        ctr: list[str | Path] = [self._binaries["ctr"], f"--address={_SOCKET}", "--namespace=k8s.io"]
        self._inside(*ctr, "images", "import", "--no-unpack", str(archive.resolve()))

    def start_kubelet(self, control_plane: ControlPlane, authority: Authority, client: ApiClient) -> None:
        """Start kubelet and kube-proxy; returns when the node is Ready."""
        grant_cluster_role(client, "system:kubelet-api-admin", "kube-apiserver-kubelet-client")
        node_user = f"system:node:{NODE_NAME}"
        serving = authority.server("kubelet", [f"DNS:{NODE_NAME}", f"IP:{self._network.node_address}"])
        kubelet = self._directory / "kubelet.json"
        kubelet.write_text(json.dumps(self._kubelet_configuration(authority, serving.certificate, serving.key)))
        self._processes.start(
            "kubelet",
            [
                *self.enter(),
                self._binaries["kubelet"],
                f"--config={kubelet}",
                f"--kubeconfig={control_plane.component_kubeconfig('kubelet', node_user, ['system:nodes'])}",
                f"--root-dir={self._directory / 'kubelet'}",
                f"--hostname-override={NODE_NAME}",
                f"--node-ip={self._network.node_address}",
            ],
        )
        proxy = self._directory / "kube-proxy.json"
        proxy.write_text(json.dumps(self._proxy_configuration(control_plane.component_kubeconfig("kube-proxy"))))
        self._processes.start("kube-proxy", [*self.enter(), self._binaries["kube-proxy"], f"--config={proxy}"])
        self._processes.wait(
            "Ready node",
            lambda: any(map(is_ready, client.get("/api/v1/nodes")["items"])),
            ["kubelet", "containerd", "kube-proxy"],
            deadline_s=180,
        )

    def _cni_configuration(self) -> Json:
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": self._network.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, portmap]}

    def _containerd_configuration(self) -> str:
        # restrict_oom_score_adj: without CAP_SYS_RESOURCE runc may not lower a score, and dies trying.
        # native: the only snapshotter that works on every file system; the images hold one small file.
        return f"""
            version = 3
            root = "{self._directory}/containerd"
            state = "/run/containerd"
            [grpc]
              address = "{_SOCKET}"
            [plugins.'io.containerd.cri.v1.images']
              snapshotter = "native"
              [plugins.'io.containerd.cri.v1.images'.pinned_images]
                sandbox = "{SANDBOX_IMAGE}"
            [plugins.'io.containerd.cri.v1.runtime']
              restrict_oom_score_adj = true
              [plugins.'io.containerd.cri.v1.runtime'.cni]
                bin_dirs = ["{cni_plugins()}"]
                conf_dir = "{self._directory}/cni"
        """

    def _kubelet_configuration(self, authority: Authority, certificate: Path, key: Path) -> Json:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self._network.node_address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(authority.pair.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "podLogsDir": str(self._directory / "pod-logs"),
            "volumePluginDir": str(self._directory / "volume-plugins"),
            # Kubernetes 1.36 refuses cgroup v1 unless told otherwise. All pods run below a cgroup of the cluster's
            # own, made without systemd; how much of the machine they may have together is not limited there.
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{cgroup_name(self._directory)}",
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "cpuCFSQuotaPeriod": _CPU_QUOTA_PERIOD,
            # A machine whose disk is nearly full must not lose images that no registry could bring back.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
            "nodeStatusUpdateFrequency": "2s",
        }

    def _proxy_configuration(self, kubeconfig: Path) -> Json:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            "hostnameOverride": NODE_NAME,
            "clusterCIDR": self._network.pods,
            # nftables mode needs more of the kernel than every machine has.
            "mode": "iptables",
            # Pods share one bridge: without masquerading, a Service's answer would go from pod to pod past the
            # translation, except with a kernel module that cannot be counted on.
            "iptables": {"masqueradeAll": True, "minSyncPeriod": "100ms"},
            # The connection table's size belongs to the whole machine.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }


def _create_cgroup(path: Path) -> None:
    path.mkdir()
    for setting in ("cpuset.cpus", "cpuset.mems"):
        inherited = path.parent / setting
        # Version 1 starts a new cpuset empty, and no process can be put into an empty one.
        if inherited.exists():
            (path / setting).write_text(inherited.read_text())
