"""The parts of the local cluster that need no cluster to be tested."""

from __future__ import annotations

import fcntl
import io
import json
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from e2e.cluster import ClusterError
from e2e.cluster.binaries import NEEDED, PROGRAMS, Binaries, ensure_binaries, in_right_version, upstream_version
from e2e.cluster.images import write_scratch_image
from e2e.cluster.network import NodeNetwork, choose_block, host_networks
from e2e.cluster.processes import Processes, clean_environment, environment_of
from e2e.cluster.removal import cgroup_name, host_link, node_link
from e2e.cluster.state import Owner, Record, cache_directory, cluster_directory, read_record

STARTS = 400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMFLEET_CACHE", str(tmp_path / "cache"))
    return cache_directory()


def _record(owner: Owner | None) -> Record:
    return Record("name", "control-plane", "ready", owner, 20_000, None)


@pytest.mark.parametrize("name", ["", "Upper", "-a", "a-", "a/b", "..", "a" * 41])
def test_a_cluster_name_that_could_not_be_a_directory_is_refused_by_name(name: str) -> None:
    with pytest.raises(ClusterError, match=r"cluster name .* is refused: use at most 40"):
        cluster_directory(name)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for record in (_record(None), _record(Owner.this_process()), replace(_record(None), block="10.208.0.0/16")):
        record.save(tmp_path)
        assert read_record(tmp_path) == record


def test_a_cluster_is_abandoned_when_its_owner_has_died_or_its_pid_belongs_to_another_process() -> None:
    owner = Owner.this_process()
    assert not _record(owner).abandoned()
    assert _record(replace(owner, started_ticks=owner.started_ticks - 1)).abandoned()
    assert not _record(None).abandoned()
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert _record(Owner(ended.pid, 1)).abandoned()


def test_names_in_shared_places_differ_between_caches_and_fit() -> None:
    here, there = Path("/a/clusters/same"), Path("/b/clusters/same")
    assert host_link(here) != host_link(there)
    assert cgroup_name(here) != cgroup_name(there)
    assert host_link(here) != node_link(here)
    assert len(host_link(here)) <= 15


def test_the_parts_of_a_block_do_not_overlap() -> None:
    parts = NodeNetwork("10.208.0.0/16")
    pods, services = IPv4Network(parts.pods), IPv4Network(parts.services)
    link = IPv4Network(f"{parts.host_address}/30", strict=False)
    assert {parts.host_address, parts.node_address} == set(map(str, link.hosts()))
    for part in (pods, services, link):
        assert part.subnet_of(IPv4Network(parts.block))
    assert not pods.overlaps(services)
    assert not link.overlaps(pods)
    assert not link.overlaps(services)


def test_a_block_overlaps_nothing_that_is_used() -> None:
    used = [IPv4Network("10.0.0.0/8"), IPv4Network("100.64.3.7/32"), IPv4Network("100.65.0.0/16")]
    assert choose_block(used) == "100.66.0.0/16"
    routed = host_networks()
    assert not any(IPv4Network(choose_block(routed)).overlaps(network) for network in routed)


def test_no_free_block_is_an_error_and_not_an_overlap() -> None:
    with pytest.raises(ClusterError, match="no address range is free"):
        choose_block([IPv4Network("0.0.0.0/1"), IPv4Network("128.0.0.0/1")])


def test_an_image_archive_is_reproducible_and_describes_its_layer(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    first = write_scratch_image(tmp_path / "1.tar", ["localhost/a:1", "localhost/b:1"], {"/p": program}, ["/p"])
    second = write_scratch_image(tmp_path / "2.tar", ["localhost/a:1", "localhost/b:1"], {"/p": program}, ["/p"])
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        content = {member.name: _read(archive, member) for member in archive}
    [manifest] = json.loads(content["manifest.json"])
    assert manifest["RepoTags"] == ["localhost/a:1", "localhost/b:1"]
    with tarfile.open(fileobj=io.BytesIO(content[manifest["Layers"][0]])) as layer:
        [entry] = layer.getmembers()
        assert (entry.name, entry.mode, _read(layer, entry)) == ("p", 0o755, b"\x7fELF")


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    assert opened is not None
    return opened.read()


def test_versions_are_those_that_the_modules_pin() -> None:
    versions = {name: upstream_version(program) for name, program in PROGRAMS.items()}
    assert set(NEEDED["node"]) | {"helm"} == versions.keys()
    for name in ("kube-apiserver", "kube-scheduler", "kube-controller-manager", "kubelet", "kube-proxy", "kubectl"):
        assert versions[name] == "v1.36.3"
    assert versions["etcd"] == "v3.6.16"
    assert {versions[name] for name in ("containerd", "containerd-shim-runc-v2", "ctr")} == {"v2.4.2"}
    assert (versions["kwok"], versions["helm"], versions["pause"]) == ("v0.8.0", "v3.22.0", None)


def _with_program(monkeypatch: pytest.MonkeyPatch, directory: Path, says: str) -> Path:
    directory.mkdir()
    etcd = directory / "etcd"
    etcd.write_text(f"#!/bin/sh\necho '{says}'\n")
    etcd.chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(directory))
    return etcd


def test_a_program_the_machine_has_in_the_right_version_is_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd = _with_program(monkeypatch, tmp_path / "assets", "etcd Version: 3.6.16")
    lines: list[str] = []
    binaries = ensure_binaries(["etcd"], lines.append)
    assert binaries["etcd"].resolve() == etcd
    assert lines[0] == "building etcd (1 of 1) ..."
    assert lines[1].startswith(f"  etcd found as {etcd}")
    assert ensure_binaries(["etcd"], lines.append) == binaries
    assert len(lines) == 2


@pytest.mark.parametrize("version", ["3.6.1", "3.6.160", "13.6.16", "3.6.16-rc.1", "3.6.16+dirty"])
def test_a_program_in_another_version_is_not_used(
    version: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd = _with_program(monkeypatch, tmp_path / "assets", f"etcd Version: {version}")
    assert not in_right_version(etcd, PROGRAMS["etcd"])


def test_our_programs_come_before_the_machines_on_the_components_path() -> None:
    assert Binaries(Path("/ours")).search_path.startswith("/ours:")


def test_components_get_no_proxy_and_no_kubeconfig_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "http_proxy", "NO_PROXY", "KUBECONFIG"):
        monkeypatch.setenv(name, "x")
    assert not {"HTTPS_PROXY", "http_proxy", "NO_PROXY", "KUBECONFIG"} & clean_environment().keys()


def test_a_component_is_found_and_ended_by_another_process_of_ours(tmp_path: Path) -> None:
    starter, other = Processes(tmp_path, "/usr/bin:/bin"), Processes(tmp_path, "/usr/bin:/bin")
    pid = starter.start("sleeper", ["sleep", "600"])
    bystander = Processes(tmp_path / "other", "/usr/bin:/bin")
    (tmp_path / "other").mkdir()
    bystander.start("sleeper", ["sleep", "600"])
    try:
        assert other.pids("sleeper") == [pid]
        assert other.alive("sleeper")
        other.stop("sleeper", grace_s=5)
        assert not starter.alive("sleeper")
        assert bystander.alive("sleeper")
    finally:
        starter.kill_all()
        bystander.kill_all()


def test_a_process_shows_its_environment_from_the_moment_it_is_started() -> None:
    """One in forty starts is met while the kernel lays the program out and shows no environment."""
    marks = {"MARK": "mine"}
    for _ in range(STARTS):
        with subprocess.Popen(["sleep", "600"], env=marks, executable="/bin/sleep") as started:
            seen = environment_of(started.pid, time.monotonic() + 10)
            started.kill()
        assert seen == b"MARK=mine\0"


def test_what_its_killed_owner_had_forked_and_not_yet_made_a_component_is_ended_too(tmp_path: Path) -> None:
    """The process has its parent's environment for another half second, but its log already."""
    processes = Processes(tmp_path, "/usr/bin:/bin")
    marks = [f"{name}={value}" for name, value in processes.environment("late").items()]
    (tmp_path / "logs").mkdir()
    with open(tmp_path / "logs" / "late.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_SH)
        command = ["sh", "-c", 'sleep 0.5; exec env "$@" sleep 600', "sh", *marks]
        forked = subprocess.Popen(command, stdout=log, env={"PATH": "/usr/bin:/bin"})
    try:
        assert processes.pids() == []
        processes.kill_all()
        assert forked.poll() == -signal.SIGKILL
    finally:
        forked.kill()
        forked.wait()


def test_a_component_that_ignores_the_polite_signal_is_ended_all_the_same(tmp_path: Path) -> None:
    processes = Processes(tmp_path, "/usr/bin:/bin")
    processes.start("stubborn", ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"])
    _eventually(lambda: "ready" in processes.log_tail("stubborn"))
    processes.stop("stubborn", grace_s=0.2)
    assert processes.pids() == []


def test_waiting_ends_with_the_log_of_the_component_that_died(tmp_path: Path) -> None:
    processes = Processes(tmp_path, "/usr/bin:/bin")
    processes.start("doomed", ["sh", "-c", "echo out of luck; exit 3"])
    with pytest.raises(ClusterError, match=r"(?s)doomed ended while waiting for a miracle.*out of luck"):
        processes.wait("a miracle", lambda: False, ["doomed"], deadline_s=20)
    processes.kill_all()


def test_waiting_ends_at_its_deadline_with_the_logs_so_far(tmp_path: Path) -> None:
    processes = Processes(tmp_path, "/usr/bin:/bin")
    processes.start("idle", ["sh", "-c", "echo still here; sleep 600"])
    _eventually(lambda: "still here" in processes.log_tail("idle"))
    with pytest.raises(ClusterError, match=r"(?s)no miracle within 0.2 s.*still here"):
        processes.wait("miracle", lambda: False, ["idle"], deadline_s=0.2)
    processes.kill_all()
    assert processes.pids() == []


def _eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)
