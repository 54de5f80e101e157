"""The cluster's command line, and what becomes of a start that is interrupted or killed."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster
from e2e.cluster.processes import marked_processes
from e2e.cluster.removal import cgroup_name, cgroup_parents, host_link
from e2e.cluster.state import cluster_directory

_CHECKOUT = Path(__file__).parents[2]
_COMMAND = [sys.executable, "-m", "e2e.cluster"]


@pytest.fixture
def name() -> Iterator[str]:
    name = f"test-{secrets.token_hex(4)}"
    yield name
    _run("down", "--name", name)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_COMMAND, *arguments], cwd=_CHECKOUT, capture_output=True, text=True, timeout=120)


def _assert_nothing_is_left(name: str) -> None:
    directory = cluster_directory(name)
    assert marked_processes(directory) == []
    assert not directory.exists()
    assert not Path("/sys/class/net", host_link(directory)).exists()
    assert not any((parent / cgroup_name(directory)).exists() for parent in cgroup_parents())


def _start_up_to(name: str, profile: str, component: str) -> subprocess.Popen[str]:
    """Begin `up` in a process of its own and return when `component` has been started."""
    # In the background of a shell SIGINT is ignored, which a program inherits.
    command = ["env", "--default-signal=INT", *_COMMAND, "up", "--profile", profile, "--name", name]
    begun = subprocess.Popen(command, cwd=_CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    directory = cluster_directory(name)
    _eventually(lambda: bool(marked_processes(directory, component)), f"{component} of {name}")
    return begun


def _eventually(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)


@pytest.mark.cluster
def test_up_twice_status_kubeconfig_and_down(name: str) -> None:
    first = _run("up", "--name", name)
    assert first.returncode == 0, first.stderr
    assert "waiting for etcd" in first.stderr
    kubeconfig = first.stdout.strip()
    assert Path(kubeconfig).stat().st_mode & 0o077 == 0
    cluster = Cluster.attach(name)
    cluster.kubectl("create", "configmap", "kept")

    second = _run("up", "--name", name)
    assert (second.returncode, second.stdout.strip()) == (0, kubeconfig)
    assert f"cluster {name} is already running" in second.stderr
    assert "configmap/kept" in cluster.kubectl("get", "configmap", "kept", "-o", "name")

    assert f"{name}  control-plane  healthy  {kubeconfig}" in _run("status").stdout
    assert _run("kubeconfig", "--name", name).stdout.strip() == kubeconfig

    other_profile = _run("up", "--name", name, "--profile", "node")
    assert other_profile.returncode == 1
    assert "take it down first" in other_profile.stderr or "needs root" in other_profile.stderr

    assert _run("down", "--name", name).returncode == 0
    _assert_nothing_is_left(name)
    assert _run("down", "--name", name).returncode == 0
    gone = _run("kubeconfig", "--name", name)
    assert (gone.returncode, gone.stderr) == (1, f"error: no cluster {name} is running\n")


@pytest.mark.cluster
def test_up_replaces_a_cluster_that_has_lost_a_component(name: str) -> None:
    assert _run("up", "--name", name).returncode == 0
    [etcd] = marked_processes(cluster_directory(name), "etcd")
    os.kill(etcd, signal.SIGKILL)
    _eventually(lambda: not marked_processes(cluster_directory(name), "etcd"), "end of etcd")
    status = _run("status")
    assert status.returncode == 1
    assert f"{name}  control-plane  broken" in status.stdout
    again = _run("up", "--name", name)
    assert again.returncode == 0
    assert f"removing the broken cluster {name}" in again.stderr
    assert Cluster.attach(name).healthy()


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_in_the_middle_of_up_leaves_nothing(name: str, number: signal.Signals) -> None:
    starting = _start_up_to(name, "control-plane", "kube-apiserver")
    starting.send_signal(number)
    _, said = starting.communicate(timeout=60)
    assert starting.returncode == 130
    assert "interrupted" in said
    _assert_nothing_is_left(name)


@pytest.mark.cluster
def test_what_a_killed_up_left_is_removed_by_down(name: str) -> None:
    starting = _start_up_to(name, "control-plane", "kube-apiserver")
    starting.kill()
    starting.communicate(timeout=60)
    assert marked_processes(cluster_directory(name))
    assert _run("down", "--name", name).returncode == 0
    _assert_nothing_is_left(name)


@pytest.mark.cluster
def test_what_a_killed_process_left_is_removed_by_the_next_start_of_any_cluster(name: str) -> None:
    starting = _start_up_to(name, "control-plane", "etcd")
    starting.kill()
    starting.communicate(timeout=60)
    with Cluster.start("control-plane"):
        _assert_nothing_is_left(name)


@pytest.mark.cluster
def test_a_cluster_that_belongs_to_a_live_process_is_not_taken_from_it(name: str) -> None:
    with Cluster.start("control-plane", name) as cluster:
        for command in ("up", "down"):
            refused = _run(command, "--name", name)
            assert refused.returncode == 1
            assert f"cluster {name} belongs to the live process {os.getpid()}" in refused.stderr
        assert cluster.healthy()


@pytest.mark.node
@pytest.mark.skipif(os.geteuid() != 0, reason="a real node needs root")
@pytest.mark.parametrize("component", ["namespaces", "kubelet"])
def test_an_interrupt_while_a_node_starts_leaves_nothing(name: str, component: str) -> None:
    starting = _start_up_to(name, "node", component)
    starting.send_signal(signal.SIGINT)
    starting.communicate(timeout=60)
    assert starting.returncode == 130
    _assert_nothing_is_left(name)


@pytest.mark.node
@pytest.mark.skipif(os.geteuid() != 0, reason="a real node needs root")
def test_what_a_killed_start_of_a_node_left_is_removed_by_down(name: str) -> None:
    starting = _start_up_to(name, "node", "kubelet")
    starting.kill()
    starting.communicate(timeout=60)
    assert Path("/sys/class/net", host_link(cluster_directory(name))).exists()
    assert _run("down", "--name", name).returncode == 0
    _assert_nothing_is_left(name)


def test_a_bad_name_is_one_line_and_exit_code_1() -> None:
    refused = _run("up", "--name", "No Such Name")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "cluster name 'No Such Name' is refused" in refused.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    assert _run("sideways").returncode == 2
