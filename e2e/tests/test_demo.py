"""The demo keeps its claims, and leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster
from e2e.cluster.node import SANDBOX_IMAGE
from e2e.cluster.processes import marked_processes
from e2e.cluster.removal import cgroup_name, cgroup_parents, host_link
from e2e.cluster.state import cache_directory, state_directories
from e2e.demo.session import RESULT, down

NAME = "demo-test"
DEADLINE_S = 900

pytestmark = [pytest.mark.timeout(2 * DEADLINE_S)]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Takes the demo down afterwards, and fails the test if anything of it stays."""
    before = _machine()
    yield
    down(NAME)
    assert _machine() - before == set()
    assert not (cache_directory() / f"session-{NAME}").exists()
    assert not (cache_directory() / "clusters" / NAME).exists()


def _machine() -> set[str]:
    """Network links, routes and mounts of this machine, but for those of other clusters that are up now."""
    found = set(Path("/proc/mounts").read_text().splitlines())
    for show in (["ip", "-brief", "link"], ["ip", "route"]):
        found |= set(subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines())
    theirs = [host_link(directory) for directory in state_directories()]
    return {line for line in found if not any(link in line for link in theirs)}


def _demo(*arguments: str, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "e2e.demo", *arguments, "--name", NAME]
    environment = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    if kubeconfig is not None:
        environment["KUBECONFIG"] = str(kubeconfig)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)


def _claims_hold(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("demo ok: services=1 variants="), done.stdout
    result = json.loads(RESULT.read_text())
    assert result["ok"]
    assert result["failed_requests"] == 0
    assert result["streamed_tokens"] == 96
    assert result["first_plan"] == {"cpu-slow": 2}
    assert result["second_plan"].get("cpu-slow", 0) <= 1
    assert result["background_requests"] > 0
    assert result["moved_streams"] > 0
    assert result["changed_answers"] == 0


@pytest.mark.node
@pytest.mark.long(130)
@pytest.mark.usefixtures("nothing_left")
def test_the_demo_keeps_every_claim() -> None:
    _claims_hold(_demo("up"))


@pytest.mark.full
@pytest.mark.usefixtures("nothing_left")
def test_the_demo_runs_again_while_it_is_up() -> None:
    _claims_hold(_demo("up"))
    _claims_hold(_demo("up"))


@pytest.fixture
def borrowed_cluster() -> Iterator[Cluster]:
    """A real node that belongs to somebody, with a pod of his."""
    with Cluster.start("node") as cluster:
        cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=30s")
        cluster.kubectl("wait", "--for=create", f"lease/{cluster.node_name}", "-n", "kube-node-lease", "--timeout=60s")
        cluster.kubectl("run", "somebodys", f"--image={SANDBOX_IMAGE}")
        cluster.kubectl("wait", "--for=condition=Ready", "pod/somebodys", "--timeout=60s")
        yield cluster


_EACH_OBJECT = "{range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{'\\n'}{end}"


def _contents(cluster: Cluster) -> dict[str, set[str]]:
    """What is in a cluster: every object but events, what its node is and offers, every process."""
    kinds = cluster.kubectl("api-resources", "--verbs=list,get", "-o", "name").split()
    listed = ",".join(kind for kind in kinds if kind.partition(".")[0] not in ("events", "componentstatuses"))
    node = json.loads(cluster.kubectl("get", "node", cluster.node_name, "-o", "json"))
    offered = [node["metadata"]["labels"], node["status"]["capacity"], node["status"]["allocatable"]]
    in_pods = [
        processes.read_text().split()
        for parent in cgroup_parents()
        for processes in (parent / cgroup_name(cluster.directory)).rglob("cgroup.procs")
    ]
    return {
        "kinds": set(kinds),
        "objects": set(cluster.kubectl("get", listed, "-A", "-o", f"jsonpath={_EACH_OBJECT}").splitlines()),
        "node": {f"{name}={value}" for values in offered for name, value in values.items()},
        "components": {str(pid) for pids in cluster.components().values() for pid in pids},
        "processes of pods": {pid for pids in in_pods for pid in pids},
    }


@pytest.mark.full
@pytest.mark.node
@pytest.mark.usefixtures("nothing_left")
def test_the_whole_demo_runs_in_a_borrowed_cluster_and_leaves_it_as_it_was(borrowed_cluster: Cluster) -> None:
    before = _contents(borrowed_cluster)
    _claims_hold(_demo("up", kubeconfig=borrowed_cluster.kubeconfig))
    during = _contents(borrowed_cluster)
    assert all(during[what] - before[what] for what in before.keys() - {"components"}), "it did run in there"
    ended = _demo("down")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    until = time.monotonic() + 60
    while changed := {
        what: now ^ before[what] for what, now in _contents(borrowed_cluster).items() if now != before[what]
    }:
        assert time.monotonic() < until, changed
        time.sleep(1)


@pytest.mark.full
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("after_s", [2, 15, 40])
def test_an_interrupt_in_the_middle_ends_everything(after_s: float) -> None:
    # In the background of a shell SIGINT is ignored, which a program inherits.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "e2e.demo", "up", "--name", NAME]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(after_s)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=120) == 130
    for directory in (cache_directory() / f"session-{NAME}", cache_directory() / "clusters" / NAME):
        assert marked_processes(directory) == []
        assert not directory.exists()
