"""The node profile as the demo relies on it: real pods, their limits, and nothing left behind."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Cluster, ClusterError
from e2e.cluster.images import write_scratch_image
from e2e.cluster.node import ENGINE_IMAGE, SANDBOX_IMAGE
from e2e.cluster.processes import marked_processes
from e2e.cluster.pytest_plugin import fresh_namespace
from e2e.cluster.removal import cgroup_name, cgroup_parents, host_link
from e2e.cluster.state import cluster_directory

pytestmark = pytest.mark.node

_PYTHON = Path(sys.executable).resolve()
# What a pod needs of the host to run the host's Python.
_HOST_PATHS = ("/usr", "/lib", "/lib64", "/bin", str(_PYTHON.parents[1]))


@pytest.fixture
def room(node_cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own on the cluster with the real node."""
    with fresh_namespace(node_cluster) as name:
        yield name


def _python_pod(name: str, arguments: list[str], **container: Any) -> dict[str, Any]:
    paths = [path for path in _HOST_PATHS if Path(path).exists()]
    volumes = [{"name": f"host-{index}", "hostPath": {"path": path}} for index, path in enumerate(paths)]
    mounts = [{"name": f"host-{index}", "mountPath": path, "readOnly": True} for index, path in enumerate(paths)]
    command = {"image": ENGINE_IMAGE, "command": [str(_PYTHON), *arguments], "volumeMounts": mounts}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": name, **command, **container}],
            "volumes": volumes,
        },
    }


def _run(cluster: Cluster, namespace: str, pod: dict[str, Any]) -> dict[str, Any]:
    name = pod["metadata"]["name"]
    cluster.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "-n", namespace, "--timeout=60s")
    running: dict[str, Any] = json.loads(cluster.kubectl("get", "pod", name, "-n", namespace, "-o", "json"))
    return running


def _status_of(url: str) -> int:
    """The HTTP status at `url`, without the environment's proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        status: int = answer.status
    return status


def _processes_in_cgroup(pod: dict[str, Any], cluster: Cluster) -> list[int]:
    found: list[int] = []
    for parent in cgroup_parents():
        for directory in (parent / cgroup_name(cluster_directory(cluster.name))).rglob(
            f"pod{pod['metadata']['uid']}/*/cgroup.procs"
        ):
            found += map(int, directory.read_text().split())
    return sorted(set(found))


def test_a_pod_of_the_pause_image_runs(node_cluster: Cluster, room: str) -> None:
    node_cluster.kubectl("run", "idle", f"--image={SANDBOX_IMAGE}", "-n", room)
    node_cluster.kubectl("wait", "--for=condition=Ready", "pod/idle", "-n", room, "--timeout=60s")
    pod = json.loads(node_cluster.kubectl("get", "pod", "idle", "-n", room, "-o", "json"))
    assert pod["spec"]["nodeName"] == node_cluster.node_name
    assert pod["status"]["containerStatuses"][0]["state"]["running"]


def test_an_imported_image_can_be_run(node_cluster: Cluster, room: str, tmp_path: Path) -> None:
    reference = f"localhost/imported-{room}:1"
    files = {"/waits": node_cluster.binaries["pause"]}
    node_cluster.load_image(write_scratch_image(tmp_path / "image.tar", [reference], files, ["/waits"]))
    node_cluster.kubectl("run", "imported", f"--image={reference}", "--image-pull-policy=Never", "-n", room)
    node_cluster.kubectl("wait", "--for=condition=Ready", "pod/imported", "-n", room, "--timeout=60s")


def test_pod_and_service_addresses_answer_on_the_host_and_between_pods(node_cluster: Cluster, room: str) -> None:
    probe = {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1}
    web = _python_pod("web", ["-m", "http.server", "8000"], readinessProbe=probe)
    pod = _run(node_cluster, room, web)
    node_cluster.kubectl("expose", "pod", "web", "--port=80", "--target-port=8000", "-n", room)
    service = json.loads(node_cluster.kubectl("get", "service", "web", "-n", room, "-o", "json"))
    service_url = f"http://{service['spec']['clusterIP']}/"

    assert _status_of(f"http://{pod['status']['podIP']}:8000/") == 200
    _wait_for(lambda: _answers(service_url), "the service address")

    # From a pod to itself through its Service: the case that needs the bridge's hairpin.
    ask = f"import urllib.request as r; print(r.urlopen({service_url!r}, timeout=10).status)"
    answer = node_cluster.kubectl("exec", "web", "-n", room, "--", str(_PYTHON), "-c", ask)
    assert answer.strip() == "200"
    assert '"GET / HTTP/1.1" 200' in node_cluster.kubectl("logs", "web", "-n", room)


def _answers(url: str) -> bool:
    try:
        return _status_of(url) == 200
    except OSError:
        return False


def _wait_for(check: Any, what: str, deadline_s: float = 15) -> None:
    deadline = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < deadline, f"no {what} within {deadline_s} s"
        time.sleep(0.1)


def test_a_cpu_limit_is_enforced_in_short_periods(node_cluster: Cluster, room: str) -> None:
    busy = _python_pod("busy", ["-c", "while True: pass"], resources={"limits": {"cpu": "200m"}})
    pod = _run(node_cluster, room, busy)
    [pid] = _processes_in_cgroup(pod, node_cluster)[-1:]
    begun, used = time.monotonic(), _cpu_seconds(pid)
    time.sleep(3)
    share = (_cpu_seconds(pid) - used) / (time.monotonic() - begun)
    # Never more than the limit, whatever else the machine does; a busy machine may give less.
    assert 0 < share <= 0.25
    assert _quota_period_us(pid) == 10_000


def _cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _quota_period_us(pid: int) -> int:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return int(Path(f"/sys/fs/cgroup/cpu{path}/cpu.cfs_period_us").read_text())
        if controllers == "" and Path(f"/sys/fs/cgroup{path}/cpu.max").exists():
            return int(Path(f"/sys/fs/cgroup{path}/cpu.max").read_text().split()[1])
    raise AssertionError(f"process {pid} is in no cpu cgroup")


def test_advertised_resources_and_labels_stay_and_are_scheduled_by(node_cluster: Cluster, room: str) -> None:
    resource = f"{room}.example.com/slot"
    node = node_cluster.node_name
    node_cluster.advertise(node, {resource: 1}, labels={"example.com/room": room})
    for name in ("first", "second"):
        node_cluster.kubectl(
            *("run", name, f"--image={SANDBOX_IMAGE}", "-n", room, "--overrides"),
            json.dumps({"spec": {"containers": [_slot_container(name, resource)]}}),
        )
    node_cluster.kubectl("wait", "--for=condition=Ready", "pod/first", "-n", room, "--timeout=60s")
    # Longer than two of the kubelet's own status updates.
    time.sleep(5)
    described = json.loads(node_cluster.kubectl("get", "node", node, "-o", "json"))
    assert described["status"]["capacity"][resource] == "1"
    assert described["status"]["allocatable"][resource] == "1"
    assert described["metadata"]["labels"]["example.com/room"] == room
    second = json.loads(node_cluster.kubectl("get", "pod", "second", "-n", room, "-o", "json"))
    assert second["status"]["phase"] == "Pending"
    assert f"Insufficient {resource}" in second["status"]["conditions"][0]["message"]


def _slot_container(name: str, resource: str) -> dict[str, Any]:
    return {"name": name, "image": SANDBOX_IMAGE, "resources": {"limits": {resource: "1"}}}


def test_the_kubelet_refuses_who_may_not_ask_it(node_cluster: Cluster, room: str) -> None:
    node = json.loads(node_cluster.kubectl("get", "node", node_cluster.node_name, "-o", "json"))
    [address] = [each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP"]
    kubeconfig = json.loads(node_cluster.service_account_kubeconfig(room, "default").read_text())
    authority = b64decode(kubeconfig["clusters"][0]["cluster"]["certificate-authority-data"]).decode()
    token = kubeconfig["users"][0]["user"]["token"]
    handlers = (
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cadata=authority)),
    )
    for headers, status in (({}, 401), ({"Authorization": f"Bearer {token}"}, 403)):
        request = urllib.request.Request(f"https://{address}:10250/pods", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.build_opener(*handlers).open(request, timeout=10)
        assert refusal.value.code == status
        refusal.value.close()
    assert "items" in node_cluster.kubectl("get", "--raw", f"/api/v1/nodes/{node_cluster.node_name}/proxy/pods")


# Places that containerd, the CNI library and the kubelet write to when they run outside a cluster of ours.
_SHARED_PLACES = (
    *("/var/lib/kubelet", "/var/lib/cni", "/var/lib/containerd", "/var/log/pods", "/var/log/containers"),
    *("/run/containerd", "/run/netns", "/etc/cni/net.d", "/opt/cni", "/usr/libexec/kubernetes"),
)


def _machine() -> dict[str, set[str]]:
    """What a cluster could leave on the machine, other than below names of its own."""

    def lines(*command: str) -> set[str]:
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())

    return {
        "mounts": set(Path("/proc/self/mountinfo").read_text().splitlines()),
        "firewall rules": {line for line in lines("iptables-save") if line.startswith(("-A", ":KUBE"))},
        "places": {place for place in _SHARED_PLACES if Path(place).exists()},
        "cgroups": {str(path) for parent in cgroup_parents() for path in parent.iterdir() if "k8s" in path.name},
    }


def _in_network_namespace(inode: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "ns" / "net") == inode:
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def test_two_nodes_run_side_by_side_and_down_leaves_nothing_behind(node_cluster: Cluster) -> None:
    before = _machine()
    cluster = Cluster.start("node")
    try:
        directory = cluster_directory(cluster.name)
        cluster.kubectl("run", "idle", f"--image={SANDBOX_IMAGE}")
        cluster.kubectl("wait", "--for=condition=Ready", "pod/idle", "--timeout=60s")
        pod = json.loads(cluster.kubectl("get", "pod", "idle", "-o", "json"))
        link = host_link(directory)
        assert Path("/sys/class/net", link).exists()
        assert link in subprocess.run(["ip", "route"], capture_output=True, text=True).stdout
        [kubelet] = marked_processes(directory, "kubelet")[-1:]
        namespace = os.readlink(f"/proc/{kubelet}/ns/net")
        processes = {*marked_processes(directory), *_processes_in_cgroup(pod, cluster)}
        assert len(processes) > len(cluster.components())
        assert node_cluster.healthy()
    finally:
        cluster.down()
    assert marked_processes(directory) == []
    assert {pid for pid in processes if Path(f"/proc/{pid}").exists()} == set()
    assert _in_network_namespace(namespace) == set()
    assert not Path("/sys/class/net", link).exists()
    assert link not in subprocess.run(["ip", "route"], capture_output=True, text=True).stdout
    assert [
        str(parent / cgroup_name(directory))
        for parent in cgroup_parents()
        if (parent / cgroup_name(directory)).exists()
    ] == []
    assert not directory.exists()
    assert _machine() == before
    assert node_cluster.healthy()


def test_a_start_that_fails_shows_the_log_and_leaves_nothing(
    node_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e2e.cluster.node._SOCKET", "/proc/no-socket-can-be-here")
    with pytest.raises(ClusterError, match=r"(?s)containerd ended.*end of containerd's log.*no-socket"):
        Cluster.start("node", "test-broken-start")
    directory = cluster_directory("test-broken-start")
    assert marked_processes(directory) == []
    assert not directory.exists()
    assert not Path("/sys/class/net", host_link(directory)).exists()
